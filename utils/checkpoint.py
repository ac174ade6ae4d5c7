"""Training checkpoints that survive a kill at any moment.

    <run>/checkpoints/step_000100/engine/...     DeepSpeed: trainable weights, optimiser, schedule (nothing frozen)
                                 /rank_0.pt ...  random number generators of each process
                                 /config.yaml
                                 /manifest.json  written last: step, samples, processes, size and SHA-256 of every file
    <run>/checkpoints/latest                     name of the newest

Everything is written into a folder of another name, verified and then renamed, so a folder `step_*` is complete unless
the disk damaged it; a damaged one is skipped with a warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from configs.schema import RunConfig
from utils import distributed
from utils.config import differences, git_state, load_config, save_config
from utils.ds import deepspeed
from utils.errors import CheckpointError
from utils.seed import rng_state, set_rng_state

FOLDER = "checkpoints"
_ENGINE = "engine"
_WRITING = ".writing-"
_log = logging.getLogger("aurora.checkpoint")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Samples consumed by all processes together: the position in the order of the data."""


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    config: RunConfig,
    progress: Progress,
    save_weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write the whole training state below `config.output_dir`; all processes call it, at an optimiser step's end.

    Keeps the newest `config.log.keep` checkpoints.

    Args:
        engine, config, progress: of the run.
        save_weights: called on every process with the folder being written, for what else belongs into it (the light
            checkpoint that evaluation and later stages read).

    Returns:
        The new folder.

    Raises:
        CheckpointError: it could not be written (disk full, read-only); earlier checkpoints are untouched.
    """
    root = Path(config.output_dir) / FOLDER
    final = root / f"step_{progress.step:06d}"
    writing = root / f"{_WRITING}{final.name}"
    if distributed.is_main():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    distributed.barrier()
    try:
        engine.save_checkpoint(str(writing), tag=_ENGINE, save_latest=False, exclude_frozen_parameters=True)
        if save_weights is not None:
            save_weights(writing)
        torch.save(rng_state(), writing / f"rank_{distributed.rank()}.pt")
        error = None
    except (OSError, RuntimeError) as caught:
        error = f"process {distributed.rank()}: {caught}"
    errors = [e for e in distributed.gather(error) if e]
    if errors:
        raise CheckpointError(
            f"{final}: could not be written ({'; '.join(errors)}). Remedy: free space or correct the rights of {root}; "
            "the run continues from the checkpoint before when started again."
        )
    if distributed.is_main():
        save_config(config, writing)
        manifest = {**asdict(progress), "world_size": distributed.world_size(), "git": git_state()}
        manifest["trainable"] = [name for name, p in engine.module.named_parameters() if p.requires_grad]
        manifest["files"] = _describe(writing)
        write_text(writing / "manifest.json", json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
        write_text(root / "latest", final.name)
        for old in _steps(root)[: -config.log.keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, the same on every process; None if there is none.

    Damaged ones (a file missing, of another size or another hash) are skipped with a warning.
    """
    found = None
    if distributed.is_main():
        for folder in reversed(_steps(Path(output_dir) / FOLDER)):
            damage = _damage(folder)
            if damage is None:
                found = folder
                break
            _log.warning("%s is damaged (%s) and is skipped", folder, damage)
    return distributed.from_main(found)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> Progress:
    """Put engine, generators and progress back as `save_checkpoint` found them; all processes call it.

    Raises:
        CheckpointError: the checkpoint was written by another number of processes, or trains other parameters.
    """
    manifest = read_manifest(folder)
    if manifest["world_size"] != distributed.world_size():
        raise CheckpointError(
            f"{folder}: was written by {manifest['world_size']} processes, this run has {distributed.world_size()}. "
            f"Remedy: start {manifest['world_size']} processes, or start anew from its weights with init_from."
        )
    ours = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    other = sorted(ours.symmetric_difference(manifest["trainable"]))
    if other:
        raise CheckpointError(
            f"{folder}: {len(other)} parameters are trained only here or only there, such as {other[0]}. "
            "Remedy: resume with the trainable section the checkpoint was written with (its config.yaml)."
        )
    engine.load_checkpoint(str(folder), tag=_ENGINE, load_module_strict=False)
    set_rng_state(torch.load(folder / f"rank_{distributed.rank()}.pt", weights_only=True))
    distributed.barrier()
    _log.info("continuing at step %d from %s", manifest["step"], folder)
    return Progress(manifest["step"], manifest["samples"])


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The newest complete checkpoint of the run, if it may go on under `config`; all processes call it.

    Raises:
        CheckpointError: it was written with another configuration (in more than `utils.config.FREE_ON_RESUME`).
    """
    folder = find_checkpoint(config.output_dir)
    if folder is None:
        return None
    changed = differences(config, load_config(folder / "config.yaml"))
    if changed:
        raise CheckpointError(
            f"{folder} was written with another configuration:\n  " + "\n  ".join(changed) + "\nRemedy: take the "
            "changes back, choose another output_dir, or start anew with --fresh (the earlier run keeps another name)."
        )
    return folder


def claim(output: Path) -> IO[str] | None:
    """Hold a run's folder for the life of this process, so that no two runs write into one; all processes call it.

    Returns:
        What holds it (keep it), on the main process.

    Raises:
        CheckpointError: another process holds it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    holder, error = None, None
    if distributed.is_main():
        path = output.parent / f".{output.name}.lock"  # beside the folder, which may be renamed
        holder = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder.seek(0)
            owner = holder.read().strip()
            error = f"{output}: process {owner} is writing there. Remedy: wait, stop it, or choose another output_dir."
        else:
            holder.truncate(0)
            holder.write(str(os.getpid()))
            holder.flush()
    error = distributed.from_main(error)
    if error:
        raise CheckpointError(error)
    return holder


def put_aside(output: Path) -> None:
    """Rename an earlier run's folder to `<name>.previous-<n>`; all processes call it."""
    if distributed.is_main() and output.exists():
        taken = len(list(output.parent.glob(f"{output.name}.previous-*")))
        output.rename(output.with_name(f"{output.name}.previous-{taken + 1}"))
    distributed.barrier()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON, or no object.
    """
    path = folder / "manifest.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({error}). Remedy: use another checkpoint.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object. Remedy: use another checkpoint.")
    return values


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
    return sorted(root.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def _describe(folder: Path) -> dict[str, list[Any]]:
    """Size and hash of every file below `folder`, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in files}


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        expected = read_manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} has another content than when it was written"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
