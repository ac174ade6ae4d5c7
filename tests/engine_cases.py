"""Runs inside processes that test_engine.py and test_checkpoint.py start: python tests/engine_cases.py CASE [ARGUMENT].

A small network with a frozen layer, dropout and a float32 buffer goes through the real engine and checkpoints. The main
process prints one JSON line.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.schema import RunConfig
from utils import distributed
from utils.checkpoint import Progress, checkpoint_to_resume, find_checkpoint, load_checkpoint, save_checkpoint
from utils.engine import build_engine, gradient_norm, trainable_state
from utils.errors import CheckpointError, leave
from utils.log import Means

COMBINATIONS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]


class Net(nn.Module):
    """[N,8] -> [N]; `frozen` is not trained, `scale` is a buffer that bf16 would ruin."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.dropout = nn.Dropout(dropout)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.0009765625]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(torch.tanh(self.frozen(x))))
        return self.head(self.dropout(hidden)).squeeze(-1) * self.scale.to(x.dtype)


def config(zero: int, precision: str, output: str = "unused", clip_norm: float = 0.5) -> RunConfig:
    return RunConfig(
        stage="teacher",
        output_dir=output,
        data={"answer": "class"},
        optim={"lr": 1e-2, "steps": 10, "warmup_steps": 2, "clip_norm": clip_norm, "group_lr_scale": {"head": 2.0}},
        engine={"zero_stage": zero, "precision": precision, "accumulation": 2, "micro_batch": 2},
        log={"samples_every": 0, "save_every": 2, "keep": 2},
    )


def data(step: int) -> tuple[Tensor, Tensor]:
    """All processes' micro-batches of one optimiser step: [2 * world * 2, 8] and targets."""
    generator = torch.Generator().manual_seed(step)
    count = 4 * distributed.world_size()
    x = torch.randn(count, 8, generator=generator)
    return x, x.sum(1)


def steps(engine: Any, numbers: range) -> list[float]:
    """Mean loss of this process and step."""
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in numbers:
        x, y = data(step)
        mine = 0.0
        for micro in range(2):
            first = (micro * distributed.world_size() + distributed.rank()) * 2
            loss = (engine(x[first : first + 2].to(dtype)).float() - y[first : first + 2]).square().mean()
            engine.backward(loss)
            engine.step()
            mine += loss.item() / 2
        losses.append(mine)
    return losses


def make(zero: int, precision: str, dropout: float = 0.0, **options: Any) -> tuple[Any, RunConfig]:
    distributed.seed_everything(0)
    run = config(zero, precision, **options)
    engine = build_engine(Net(dropout), run)
    distributed.seed_everything(0, distributed.rank())
    engine.train()
    return engine, run


def train_all() -> dict[str, Any]:
    """Weights after four steps under every combination."""
    found = {}
    for zero, precision in COMBINATIONS:
        engine, _ = make(zero, precision)
        losses = steps(engine, range(4))
        state = trainable_state(engine)
        same = len({tuple(row) for row in distributed.gather(_flat(state))}) == 1
        found[f"{zero} {precision}"] = {
            "losses": losses,
            "weights": _flat(state),
            "names": list(state),
            "same_on_all": same,
            "buffer": str(engine.module.scale.dtype),
            "norm": gradient_norm(engine),
            "rates": engine.get_lr(),
        }
        engine.destroy()
        engine, _ = make(zero, precision, clip_norm=0.0)
        steps(engine, range(1))
        found[f"{zero} {precision}"]["norm_unclipped"] = gradient_norm(engine)
        engine.destroy()
    return found


def resume_all(folder: str) -> dict[str, Any]:
    """Losses of steps 2 and 3 without and with a checkpoint between, for every combination; equal to the bit?"""
    found = {}
    for zero, precision in COMBINATIONS:
        output = f"{folder}/{zero}_{precision}"
        engine, run = make(zero, precision, dropout=0.3, output=output)
        steps(engine, range(2))
        save_checkpoint(engine, run, Progress(2, 8))
        straight = (steps(engine, range(2, 4)), _draws(), _flat(trainable_state(engine)), engine.get_lr())
        engine.destroy()
        engine, run = make(zero, precision, dropout=0.3, output=output)
        random.random(), np.random.rand(), torch.rand(1)
        progress = load_checkpoint(engine, find_checkpoint(output))
        again = (steps(engine, range(2, 4)), _draws(), _flat(trainable_state(engine)), engine.get_lr())
        engine.destroy()
        found[f"{zero} {precision}"] = straight == again and (progress.step, progress.samples) == (2, 8)
    return found


def keep_and_damage(folder: str) -> dict[str, Any]:
    """What is kept, what is skipped, what is refused."""
    engine, run = make(2, "fp32", output=folder)
    root = Path(folder) / "checkpoints"
    for step in (1, 2, 3):
        steps(engine, range(step, step + 1))
        save_checkpoint(engine, run, Progress(step, step * 4))
    found: dict[str, Any] = {"kept": sorted(p.name for p in root.iterdir()), "latest": (root / "latest").read_text()}
    newest = root / "step_000003"
    victim = next((newest / "engine").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found["after a flipped bit"] = find_checkpoint(folder).name
    victim.write_bytes(content[:-10])
    found["after a cut"] = find_checkpoint(folder).name
    (root / ".writing-step_000009").mkdir()
    found["beside an unfinished one"] = find_checkpoint(folder).name
    manifest = root / "step_000002" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "world_size": 5}))
    found["other world"] = _refused(engine, manifest.parent)
    manifest.write_text(json.dumps({**values, "trainable": values["trainable"][1:]}))
    found["other parameters"] = _refused(engine, manifest.parent)
    (root / "step_000002" / "rank_0.pt").unlink()
    found["all damaged"] = find_checkpoint(folder)
    try:
        checkpoint_to_resume(run)
    except CheckpointError as error:
        found["refused"] = str(error)
    return found


ELASTIC = [(0, "fp32"), (2, "fp32")]


def elastic(folder: str, first: str, last: str) -> dict[str, Any]:
    """Weights after steps first..last on 8 samples a step, whatever the number of processes; saved at the end.

    Steps above 0 start from the checkpoint that is there.
    """
    found = {}
    accumulation = 4 // distributed.world_size()
    for zero, precision in ELASTIC:
        distributed.seed_everything(0)
        run = config(zero, precision, output=f"{folder}/{zero}_{precision}")
        run = run.model_copy(update={"engine": run.engine.model_copy(update={"accumulation": accumulation})})
        engine = build_engine(Net(), run)
        earlier = checkpoint_to_resume(run)
        done = load_checkpoint(engine, earlier).step if earlier else 0
        assert done == int(first), earlier
        dtype = next(engine.module.parameters()).dtype
        for step in range(int(first), int(last)):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 8, generator=generator)
            for start in range(2 * distributed.rank(), 8, 2 * distributed.world_size()):
                part = x[start : start + 2]
                engine.backward((engine(part.to(dtype)).float() - part.sum(1)).square().mean())
                engine.step()
        save_checkpoint(engine, run, Progress(int(last), 8 * int(last)))
        found[f"{zero} {precision}"] = {"weights": _flat(trainable_state(engine)), "rates": engine.get_lr()}
        engine.destroy()
    return found


def elastic_both(folder: str) -> dict[str, Any]:
    """A run that other processes began, gone on with, and an undisturbed one."""
    return {"moved": elastic(f"{folder}/moved", "2", "4"), "straight": elastic(f"{folder}/straight", "0", "4")}


def best_and_full(folder: str) -> dict[str, Any]:
    """What is kept besides the newest; what a full disk leaves."""
    engine, run = make(2, "fp32", output=folder)
    run = run.model_copy(update={"log": run.log.model_copy(update={"keep": 1, "keep_best": "loss"})})
    root = Path(folder) / "checkpoints"
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save_checkpoint(engine, run, Progress(step, step * 4, {"loss": loss}))
    found: dict[str, Any] = {"kept": sorted(p.name for p in root.iterdir()), "best": (root / "best").read_text()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        save_checkpoint(engine, run, Progress(5, 20))
    except CheckpointError as error:
        found["full"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found["after"] = sorted(p.name for p in root.iterdir())
    found["newest"] = find_checkpoint(folder).name
    return found


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it and nothing is cleaned up."""


def saving(folder: str) -> dict[str, Any]:
    """What is on disk after a kill at three moments of saving; bytes written and read by a save that is not killed."""
    distributed.seed_everything(0)
    run = config(2, "fp32", output=folder)
    run = run.model_copy(update={"log": run.log.model_copy(update={"keep": 1})})
    net = Net()
    net.body = nn.Sequential(nn.Linear(16, 50_000), nn.Linear(50_000, 16))
    engine = build_engine(net, run)
    steps(engine, range(1))
    root = Path(folder) / "checkpoints"
    before = _counted()
    save_checkpoint(engine, run, Progress(1, 4))
    size = sum(path.stat().st_size for path in (root / "step_000001").rglob("*"))
    found: dict[str, Any] = {name: (_counted()[name] - before[name]) / size for name in before}
    with mock.patch("torch.save", _half_written):
        found["half a file"] = _killed(engine, run, Progress(2, 4))
    with mock.patch("utils.checkpoint.save_config", _dying):
        found["manifest"] = _killed(engine, run, Progress(3, 4))
    found["light weights"] = _killed(engine, run, Progress(4, 4), _dying)
    found["left"] = sorted(path.name for path in root.iterdir())
    save_checkpoint(engine, run, Progress(5, 4), lambda new: found.update(latest=(root / "latest").read_text()))
    found["at last"] = sorted(path.name for path in root.iterdir())
    return found


def _counted() -> dict[str, int]:
    """Bytes that this process has written and read so far, through the page cache or not."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"written": int(lines["wchar"]), "read": int(lines["rchar"])}


def _killed(engine: Any, run: RunConfig, progress: Progress, save_weights: Any = None) -> str:
    """The checkpoint that a run would go on from after a save that was cut short."""
    try:
        save_checkpoint(engine, run, progress, save_weights)
    except Killed:
        return find_checkpoint(run.output_dir).name
    return "was not killed"


def _dying(*_: Any) -> None:
    raise Killed


def _half_written(state: Any, path: Any, **_: Any) -> None:
    Path(path).write_bytes(b"half")
    raise Killed


def means() -> dict[str, Any]:
    """Names that only some processes report count for those alone."""
    collected = Means()
    collected.add({"loss": torch.tensor(1.0 + distributed.rank()), "always": 2.0})
    if distributed.rank() == 0:
        collected.add({"loss": torch.tensor(6.0), "rare": torch.tensor(5.0)})
    return collected.reduce()


def _refused(engine: Any, folder: Path) -> str:
    try:
        load_checkpoint(engine, folder)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def _draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]


def _flat(state: dict[str, Tensor]) -> list[float]:
    return [value for tensor in state.values() for value in tensor.float().flatten().tolist()]


CASES = {f.__name__: f for f in (train_all, resume_all, keep_and_damage, elastic, elastic_both, best_and_full,
                                 saving, means)}

if __name__ == "__main__":
    distributed.start(threads=1)
    result = CASES[sys.argv[1]](*sys.argv[2:])
    if distributed.is_main():
        print(json.dumps(result))
    distributed.stop()
    leave(0)  # as run_command ends a process
