"""Training checkpoints that survive a kill at any moment.

    <run>/checkpoints/step_000100/engine/...     DeepSpeed: trainable weights, optimiser, schedule (nothing frozen)
                                 /rank_0.pt ...  random number generators of each process
                                 /config.yaml
                                 /manifest.json  written last: step, samples, processes, size and SHA-256 of each file
                                 /trained.json, adapter_model.safetensors: light weights, written after all that
    <run>/checkpoints/latest, best               name of the newest, and of the best by `log.keep_best`

What a run needs to go on is written first and once, into a folder of another name, hashed on its way
(`utils.manifest`), flushed and then renamed, so a folder `step_*` is complete unless the disk damaged it; a damaged one
is skipped with a warning. Then follow the light weights, which have a hash of their own, and only then are older
checkpoints deleted.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from configs.schema import RunConfig
from utils import distributed
from utils.config import FREE_ON_RESUME, differences, git_state, load_config, save_config
from utils.ds import deepspeed
from utils.elastic import load_repartitioned
from utils.errors import CheckpointError
from utils.manifest import damage, file_digest, read_manifest, save_hashed
from utils.seed import rng_state, set_rng_state

__all__ = ["Progress", "checkpoint_to_resume", "claim", "find_checkpoint", "load_checkpoint", "put_aside",
           "read_manifest", "save_checkpoint", "write_text"]  # fmt: skip

FOLDER = "checkpoints"
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
            writing.mkdir(parents=True)
        distributed.barrier("a folder for the checkpoint")
        mine = {str(path.relative_to(writing)): facts for path, facts in _write_state(engine, writing).items()}
        files = {name: facts for one in distributed.gather(mine, "saving") for name, facts in one.items()}
        if distributed.is_main():
            _seal(engine, config, progress, writing, files)
        distributed.barrier("saving")
        if save_weights is not None:
            save_weights(final)
        if distributed.is_main():
            _prune(root, config)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(writing, ignore_errors=True)  # gives its space back
        again = "the run continues from the newest complete checkpoint when started again"
        if distributed.lost_process(error):
            raise CheckpointError(f"{final}: another process was lost meanwhile ({error}); {again}.") from error
        raise CheckpointError(
            f"{final}: could not be written (process {distributed.rank()}: {error}). Remedy: free space or correct the "
            f"rights of {root}; {again}."
        ) from error
    distributed.barrier("saving")
    return final


class _Writer(deepspeed.runtime.checkpoint_engine.TorchCheckpointEngine):
    """DeepSpeed's own way to write its files, but hashed."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, list[Any]] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = save_hashed(state_dict, Path(path))


def _write_state(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[Path, list[Any]]:
    """This process's part of the training state; returns size and hash of its files."""
    engine.checkpoint_engine, usual = _Writer(), engine.checkpoint_engine
    try:
        engine.save_checkpoint(str(folder), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
        files = engine.checkpoint_engine.files
    finally:
        engine.checkpoint_engine = usual
    path = folder / f"rank_{distributed.rank()}.pt"
    return {**files, path: save_hashed(rng_state(), path)}


def _seal(
    engine: deepspeed.DeepSpeedEngine, config: RunConfig, progress: Progress, writing: Path, files: dict[str, list[Any]]
) -> None:
    """Write what tells whether the folder is whole, and give it its name."""
    settings = save_config(config, writing)
    files[settings.name] = [settings.stat().st_size, file_digest(settings)]
    manifest = {**asdict(progress), "world_size": distributed.world_size(), "git": git_state(), "files": files}
    manifest["trainable"] = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    write_text(writing / "manifest.json", json.dumps(manifest, indent=1))
    final = writing.with_name(writing.name.removeprefix(_WRITING))
    shutil.rmtree(final, ignore_errors=True)  # damaged, or the run would have gone on from it
    writing.rename(final)
    write_text(final.parent / "latest", final.name)


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
        load_repartitioned(engine, folder, _ENGINE, written)
    if distributed.rank() < written:  # a process that is new keeps the generators it was seeded with
        set_rng_state(torch.load(folder / f"rank_{distributed.rank()}.pt", weights_only=True))
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
        patience: seconds to wait for a process that is about to end (the rest of a run that was killed).

    Returns:
        What holds it (keep it), on the main process.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    holder, error = None, None
    if distributed.is_main():
        path = output.parent / f".{output.name}.lock"  # beside the folder, which may be renamed
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            holder = path.open("a+", encoding="utf-8")
            _lock(holder, patience)
        except BlockingIOError:
            holder.seek(0)
            owner = holder.read().strip()
            error = f"{output}: process {owner} is writing there. Remedy: wait, stop it, or choose another output_dir."
        except OSError as refused:
            error = f"output_dir = {output}: not writable ({refused}). Remedy: choose another or correct its rights."
        else:
            holder.truncate(0)
            holder.write(str(os.getpid()))
            holder.flush()
    error = distributed.from_main(error, "claiming the folder")
    if error:
        raise CheckpointError(error)
    return holder


def _lock(file: IO[str], patience: float) -> None:
    """Raises BlockingIOError when another process still holds the lock after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def put_aside(output: Path) -> None:
    """Rename an earlier run's folder to `<name>.previous-<n>`; all processes call it."""
    if distributed.is_main() and output.exists():
        names = (output.with_name(f"{output.name}.previous-{number}") for number in count(1))
        output.rename(next(name for name in names if not name.exists()))
    distributed.barrier("renaming the earlier run")


def write_text(path: Path, text: str) -> None:
    """Write a file by temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _steps(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
