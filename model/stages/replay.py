"""A step that went wrong, kept so that it can be run again (`scripts/replay.py`).

A dump holds the configuration, the trained weights, and for every micro-batch the samples' rows and the random
generators as they were before it was prepared: the micro-batch whose loss is not finite, or all of a step (of this
process) whose gradient is not, which the optimiser then has not applied. Under ZeRO-3 the weights are left out:
gathering them needs every process, and one alone fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from model.aurora.trained import save_trained
from model.stages.base import Stage
from utils import distributed
from utils.config import save_config
from utils.errors import CheckpointError, NonFiniteError
from utils.guards import named
from utils.results import write_json
from utils.seed import rng_state, set_rng_state
from utils.types import Batch, Sample


@dataclass(frozen=True)
class Micro:
    """What it takes to run a micro-batch again."""

    samples: list[dict[str, Any]]
    """See `describe`."""
    rng: dict[str, Any]
    """`utils.seed.rng_state` before the batch was prepared."""

    @property
    def names(self) -> list[tuple[str, int]]:
        """(uid, row) of the samples."""
        return [(sample["uid"], sample["row"]) for sample in self.samples]


def micro(batch: Batch) -> Micro:
    """To be called before the batch is prepared."""
    return Micro([describe(sample) for sample in batch.samples], rng_state())


@contextmanager
def dumped(stage: Stage, micros: Sequence[Micro], config: RunConfig, step: int) -> Iterator[None]:
    """Write a dump when a NonFiniteError comes out, and name it in the message.

    Args:
        stage: holds the model.
        micros: the micro-batches it may come from.
        config: the run; the dump goes to `output_dir/dumps`.
        step: from 1.
    """
    try:
        yield
    except NonFiniteError as error:
        text = str(error)
        if not text.startswith("optimiser step"):  # raised where neither step nor samples are known
            text = f"optimiser step {step}: {text} Samples: {named(name for m in micros for name in m.names)}."
        folder = Path(config.output_dir) / "dumps" / f"step_{step:06d}_rank{distributed.rank()}"
        write_dump(folder, stage, micros, config, step, text)
        raise NonFiniteError(f"{text} To run the step again: python scripts/replay.py {folder}") from None


def write_dump(folder: Path, stage: Stage, micros: Sequence[Micro], config: RunConfig, step: int, error: str) -> None:
    """Everything that `load_dump` and scripts/replay.py need."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = config.engine.zero_stage < 3
    if whole:
        save_trained(stage.model, folder)
    torch.save([m.rng for m in micros], folder / "rng.pt")
    save_config(config, folder)
    write_json(folder / "dump.json", {
        "step": step, "rank": distributed.rank(), "world_size": distributed.world_size(), "weights": whole,
        "batches": [m.samples for m in micros], "error": error,
    })  # fmt: skip


def describe(sample: Sample) -> dict[str, Any]:
    """What tells a sample from others, among them others of its row (a reflective path beside the standard one)."""
    return {"row": sample.row, "uid": sample.uid, "answer_tokens": len(sample.answer_ids), "start": sample.label_start}


def load_dump(folder: Path) -> dict[str, Any]:
    """dump.json, with the generators' state of each batch under `rng`.

    Raises:
        CheckpointError: no dump there.
    """
    try:
        found = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        return {**found, "rng": torch.load(folder / "rng.pt", weights_only=True)}
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: no dump of a training step ({error}). Remedy: name a folder of <run>/dumps."
        ) from None


def run_again(stage: Stage, batch: Batch, rng: dict[str, Any] | None) -> dict[str, Any]:
    """One forward and backward of a stage on the bare model.

    Args:
        stage: around the bare model.
        batch: the samples.
        rng: generators to start from; None = as they are.

    Returns:
        loss, parts, gradient_norm, and the first module whose output (`module`) and the first parameter whose gradient
        (`parameter`) is not finite, None where all are.
    """
    if rng is not None:
        set_rng_state(rng)
    model = stage.model
    model.zero_grad(set_to_none=True)
    culprits: list[str] = []
    hooks = [m.register_forward_hook(_Look(name, culprits)) for name, m in model.named_modules() if name]
    try:
        loss = stage.loss(stage.prepare(batch))
    finally:
        for hook in hooks:
            hook.remove()
    loss.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.float().norm() for g in gradients.values()]).norm() if gradients else torch.tensor(0.0)
    return {
        "loss": float(loss.total.detach()),
        "parts": {name: float(value) for name, value in loss.parts.items()},
        "gradient_norm": float(norm),
        "module": culprits[0] if culprits else None,
        "parameter": next((n for n, g in gradients.items() if not bool(g.isfinite().all())), None),
    }


class _Look:
    """Notes a module whose output is not finite."""

    def __init__(self, name: str, found: list[str]) -> None:
        self.name, self.found = name, found

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
            self.found.append(self.name)
