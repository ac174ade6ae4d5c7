"""Training checkpoints that survive a kill at any moment.

    <run>/checkpoints/step_000100/engine/...     DeepSpeed: trainable weights, optimiser, schedule (nothing frozen)
                                 /rank_0.pt ...  random number generators of each process
                                 /config.yaml
                                 /manifest.json  written last: step, samples, processes, size and SHA-256 of each file
                                 /trained.json, adapter_model.safetensors: light weights, written after all that
    <run>/checkpoints/latest, best               name of the newest, and of the best by `log.keep_best`

What a run needs to go on is written first, into a folder of another name, flushed, hashed and then renamed, so a folder
`step_*` is complete unless the disk damaged it; a damaged one is skipped with a warning. Then follow the light weights,
which have a hash of their own, and only then are older checkpoints deleted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from configs.schema import RunConfig
from utils import distributed
from utils.config import FREE_ON_RESUME, differences, git_state, load_config, save_config
from utils.ds import deepspeed
from utils.errors import AuroraError, CheckpointError, lost_process
from utils.files import file_digest, lock, write_text

FOLDER = "checkpoints"
FIELDS = {"step": int, "samples": int, "world_size": int, "trainable": list, "files": dict}
"""What every manifest holds."""
_ENGINE = "engine"
_WRITING = ".writing-"
_NAME = re.compile("step_[0-9]+")
_log = logging.getLogger("aurora.checkpoint")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Samples consumed by all processes together: the position in the order of the data."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means of the logged scalars since the checkpoint before; the best checkpoint is chosen by one of them."""


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    config: RunConfig,
    progress: Progress,
    save_weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write the whole training state below `config.output_dir`; all processes call it, at an optimiser step's end.

    Keeps the newest `config.log.keep` checkpoints, and the best by `config.log.keep_best`.

    Args:
        engine, config, progress: of the run.
        save_weights: called on every process with the new folder once the run could continue from it, for what else
            belongs there (the light checkpoint that evaluation and later stages read). It must replace no file.

    Returns:
        The new folder.

    Raises:
        CheckpointError: it could not be written (disk full, read-only); earlier checkpoints are untouched. A process
            that fails says so and ends at once instead of waiting for the others, which the launcher ends.
    """
    root = Path(config.output_dir) / FOLDER
    final = root / f"step_{progress.step:06d}"
    writing = root / f"{_WRITING}{final.name}"
    try:
        if distributed.is_main():
            for left in root.glob(f"{_WRITING}*"):  # of attempts that were killed
                shutil.rmtree(left, ignore_errors=True)
            save_config(config, writing)
        distributed.barrier("a folder for the checkpoint")
        engine.save_checkpoint(str(writing), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
        torch.save(distributed.rng_state(), writing / f"rank_{distributed.rank()}.pt")
        # Each process flushes and hashes its share of the files. A shared disk may show another machine's files late,
        # so what each process sees, its own files at least, is put together.
        seen = [str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file()]
        written = sorted({name for one in distributed.gather(seen, "saving") for name in one})
        mine = {name: _facts(writing / name) for name in written[distributed.rank() :: distributed.world_size()]}
        files = {name: facts for one in distributed.gather(mine, "saving") for name, facts in one.items()}
        if distributed.is_main():
            trainable = [name for name, p in engine.module.named_parameters() if p.requires_grad]
            manifest = {**asdict(progress), "world_size": distributed.world_size(), "git": git_state(), "files": files}
            write_text(writing / "manifest.json", json.dumps({**manifest, "trainable": trainable}, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # damaged, or the run would have gone on from it
            writing.rename(final)
            write_text(root / "latest", final.name)
        distributed.barrier("saving")
        if save_weights is not None:
            save_weights(final)
        if distributed.is_main():
            _prune(root, config)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(writing, ignore_errors=True)  # gives its space back
        again = "the run continues from the newest complete checkpoint when started again"
        if lost_process(error):
            raise CheckpointError(f"{final}: another process was lost meanwhile ({error}); {again}.") from error
        raise CheckpointError(
            f"{final}: could not be written (process {distributed.rank()}: {error}). Remedy: free space or correct the "
            f"rights of {root}; {again}."
        ) from error
    distributed.barrier("saving")
    return final


def _facts(path: Path) -> list[Any]:
    """Size and SHA-256 of a file that is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return [path.stat().st_size, file_digest(path)]


def _prune(root: Path, config: RunConfig) -> None:
    """Name the best checkpoint and delete what is too old."""
    best = _best(root, config)
    if best is not None:
        write_text(root / "best", best.name)
    for old in _steps(root)[: -config.log.keep]:
        if old != best:
            shutil.rmtree(old)


def _best(root: Path, config: RunConfig) -> Path | None:
    """The checkpoint with the best value of `log.keep_best`, the newest of equals; None without such a value."""
    name, sign = config.log.keep_best, 1 if config.log.best_is == "highest" else -1
    values = {}
    for folder in _steps(root) if name else ():
        try:
            found = read_manifest(folder).get("metrics", {})
        except CheckpointError:
            continue  # damaged: find_checkpoint says so when it is asked for
        if name in found:
            values[folder] = sign * found[name]
    return max(reversed(values), key=values.__getitem__) if values else None


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, the same on every process; None if there is none.

    Damaged ones (a file missing, of another size or another hash) are skipped with a warning.
    """
    found = None
    if distributed.is_main():
        for folder in reversed(_steps(Path(output_dir) / FOLDER)):
            fault = damage(folder)
            if fault is None:
                found = folder
                break
            _log.warning("%s is damaged (%s) and is skipped", folder, fault)
    return distributed.from_main(found, "reading checkpoints")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON, without one of FIELDS, or with a file that has no size and hash.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in FIELDS.items() if not isinstance(manifest[name], kind)]
        wrong += [name for name, facts in manifest["files"].items() if not _is_entry(name, facts)]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable ({error!r}). Remedy: use another checkpoint.") from None
    if wrong or not manifest["files"]:
        raise CheckpointError(f"{path}: no or wrong entry {wrong[:1] or 'files'}. Remedy: use another checkpoint.")
    return manifest


def _is_entry(name: str, facts: Any) -> bool:
    """Whether a file of a manifest has a size and a hash, and lies in the folder."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(facts, list) and [type(fact) for fact in facts] == [int, str]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        for name, (size, digest) in read_manifest(folder)["files"].items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if file_digest(path) != digest:
                return f"{name} has another content than when it was written"
    except (CheckpointError, OSError, ValueError) as error:  # ValueError: a name with a null character
        return str(error)
    return None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> Progress:
    """Put engine, generators and progress back as `save_checkpoint` found them; all processes call it.

    Raises:
        CheckpointError: it trains other parameters, or was written by another number of processes under ZeRO-3.
    """
    manifest = read_manifest(folder)
    written = manifest["world_size"]
    ours = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    other = sorted(ours.symmetric_difference(manifest["trainable"]))
    if other:
        raise CheckpointError(
            f"{folder}: {len(other)} parameters are trained only here or only there, such as {other[0]}. "
            "Remedy: resume with the trainable section the checkpoint was written with (its config.yaml)."
        )
    if written == distributed.world_size():
        engine.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False)
    else:
        _log.info("%s: optimiser states are dealt anew; the losses go on, but not equal to the bit", folder)
        _load_repartitioned(engine, folder, written)
    if distributed.rank() < written:  # a process that is new keeps the generators it was seeded with
        distributed.set_rng_state(torch.load(folder / f"rank_{distributed.rank()}.pt", weights_only=True))
    distributed.barrier("loading")
    _log.info("continuing at step %d from %s", manifest["step"], folder)
    return Progress(manifest["step"], manifest["samples"])


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The newest complete checkpoint of the run, if it may go on under `config`; all processes call it.

    Raises:
        CheckpointError: it was written with another configuration (in more than `utils.config.FREE_ON_RESUME`), or
            there are checkpoints, but every one is damaged.
    """
    folder = find_checkpoint(config.output_dir)
    if folder is None:
        root = Path(config.output_dir) / FOLDER
        damaged = distributed.from_main(len(_steps(root)), "reading checkpoints")
        if damaged:
            raise CheckpointError(
                f"{root}: all {damaged} checkpoints are damaged, see the warnings. Remedy: restore one of them, or "
                "start anew with --fresh (the earlier run keeps another name)."
            )
        return None
    before, written = load_config(folder / "config.yaml"), read_manifest(folder)["world_size"]
    moved = written != distributed.world_size()
    free = (*FREE_ON_RESUME, "engine.micro_batch", "engine.accumulation") if moved else FREE_ON_RESUME
    refused = differences(config, before, free)
    if refused:
        raise CheckpointError(
            f"{folder} was written with another configuration:\n  " + "\n  ".join(refused) + "\nRemedy: take the "
            "changes back, choose another output_dir, or start anew with --fresh (the earlier run keeps another name)."
        )
    changed = differences(config, before, ())
    if changed:
        _log.info("changed since %s:\n  %s", folder.name, "\n  ".join(changed))
    if moved and distributed.is_main():
        sizes = [c.engine.micro_batch * c.engine.accumulation * n
                 for c, n in ((before, written), (config, distributed.world_size()))]  # fmt: skip
        advice = "" if sizes[0] == sizes[1] else f"; set engine.accumulation so that it stays {sizes[0]}"
        counts = (written, distributed.world_size(), *sizes)
        _log.warning("processes: %d -> %d, samples per step: %d -> %d%s", *counts, advice)
    return folder


def claim(output: Path, patience: float = 20.0) -> IO[str] | None:
    """Hold a run's folder for the life of this process, so that no two runs write into one; all processes call it.

    Args:
        output: the run's folder.
        patience: see `files.lock`.

    Returns:
        What holds it (keep it), on the main process.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    holder, error = None, None
    if distributed.is_main():
        try:
            holder = lock(output.parent / f".{output.name}.lock", patience)  # beside the folder, which may be renamed
        except OSError as refused:
            error = f"output_dir = {output}: not writable ({refused}). Remedy: choose another or correct its rights."
        except AuroraError as refused:
            error = f"output_dir = {output}: {refused}"
    error = distributed.from_main(error, "claiming the folder")
    if error:
        raise CheckpointError(error)
    return holder


def put_aside(output: Path) -> None:
    """Rename an earlier run's folder to `<name>.previous-<n>`; all processes call it."""
    if distributed.is_main() and output.exists():
        names = (output.with_name(f"{output.name}.previous-{number}") for number in count(1))
        output.rename(next(name for name in names if not name.exists()))
    distributed.barrier("renaming the earlier run")


def _steps(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _load_repartitioned(engine: deepspeed.DeepSpeedEngine, folder: Path, written: int) -> None:
    """Weights, optimiser and schedule of a checkpoint that `written` processes made; all processes call it.

    DeepSpeed refuses another number of processes for ZeRO 1 and 2 ("automatic adjustment ... not currently supported"),
    so the partitions that each process wrote (deepspeed/runtime/zero/stage_1_and_2.py, state_dict) are read, joined and
    dealt anew here. ZeRO 0 keeps its states whole. (Its universal checkpoint needs a conversion of the folder first.)

    Raises:
        CheckpointError: ZeRO-3, whose partitions of weights are not joined here, or files of a process are missing.
    """
    zero = engine.zero_optimization_stage()
    if zero == 3:
        raise CheckpointError(
            f"{folder}: was written by {written} processes under ZeRO-3, this run has {distributed.world_size()}. "
            f"Remedy: start {written} processes, or start anew from its weights with init_from."
        )
    if zero == 0:
        engine.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False)
        return
    engine.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False, load_module_only=True)
    whole = _read(folder / _ENGINE / "mp_rank_00_model_states.pt")
    engine.lr_scheduler.load_state_dict(whole["lr_scheduler"])
    engine.global_steps, engine.global_samples = whole["global_steps"], whole["global_samples"]
    pattern = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    found = [sorted((folder / _ENGINE).glob(pattern.format(rank))) for rank in range(written)]
    if not all(found):
        raise CheckpointError(
            f"{folder}: the optimiser states of process {found.index([])} are missing. Remedy: use another checkpoint."
        )
    _deal(engine.optimizer, [_read(paths[0])["optimizer_state_dict"] for paths in found])


def _deal(optimizer: Any, states: list[dict[str, Any]]) -> None:
    """Give this process its part of the float32 master weights and of AdamW's moments."""
    base = optimizer.optimizer
    for number, group in enumerate(base.param_groups):
        # the schedule changes the rate after a step only, so the rate of the next one comes from here
        saved = states[0]["base_optimizer_state"]["param_groups"][number]
        group.update({name: value for name, value in saved.items() if name != "params"})
        masters = [state["single_partition_of_fp32_groups"][number] for state in states]
        moments = [state["base_optimizer_state"]["state"][number] for state in states]
        own = optimizer.single_partition_of_fp32_groups[number]
        own.data.copy_(_part(optimizer, masters, number))
        kept: dict[str, Tensor] = {}
        for name, value in moments[0].items():
            if isinstance(value, Tensor) and value.dim():
                # a moment is written with its padding, the masters without: the masters tell the true length
                pieces = [m[name][: len(master)] for m, master in zip(moments, masters, strict=True)]
                kept[name] = _part(optimizer, pieces, number).to(own.device, copy=True)
            else:
                kept[name] = value
        base.state[group["params"][0]] = kept


def _part(optimizer: Any, pieces: list[Tensor], group: int) -> Tensor:
    """This process's share of a group whose parts lie one after the other in `pieces`."""
    processes = optimizer.real_dp_process_group[group]
    world = torch.distributed.get_world_size(processes)
    aligned = optimizer.nccl_start_alignment_factor * world
    flat = optimizer.flatten_dense_tensors_aligned([piece.reshape(-1) for piece in pieces], aligned)
    return optimizer.get_data_parallel_partitions(flat, group)[torch.distributed.get_rank(processes)]


def _read(path: Path) -> dict[str, Any]:
    # DeepSpeed's own files, whose hashes the manifest has just confirmed; they hold its settings beside tensors
    return torch.load(path, map_location="cpu", weights_only=False)
