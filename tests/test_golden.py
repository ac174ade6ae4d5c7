"""Numbers that stay as tests/fixtures/golden.json records them, under every change that is not meant to change numbers.

    python -m tests.test_golden --renew

computes everything anew, prints what moved and records it; a part of which nothing moved stays as it was recorded. Do
that in the commit that is meant to move them, and say there why.

| part | what | tolerance |
|---|---|---|
| losses | all that the first 5 steps of each mini stage log; teacher and GRPO on 2 processes too | see CLOSE |
| log_probs | of the answer tokens of two groups under the tiny backbone | 1e-5 |
| metrics | J, F, S of a few masks under every protocol | 1e-12 |
| configs | every shipped configuration with all its fields; a new field is no difference | equal |
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dataset.loader  # noqa: F401 - train_ds.py imports it late; here it is imported once for all runs
import train_ds
from dataset.mini.world import WorldSettings, make_mini_world
from dataset.prompt import load_tokenizer
from tests.aurora_cases import tiny_model
from tests.grpo_cases import RAGGED, two_clips
from tests.tiny_run import ROOT, environment, metrics
from utils.config import load_config
from utils.metrics import PROTOCOLS, fit_logits, fit_masks, score_batch

GOLDEN = Path(__file__).parent / "fixtures" / "golden.json"
STEPS = 5
WORLD = WorldSettings(train=4, val=0, test_s=0, test_u=0, test_n=0, train_null=1, rows_per_train_clip=4)
CLOCK = ("tokens_per_second",)
"""What a run logs about time, besides what `tests.tiny_run.metrics` leaves out."""
# Measured: with two threads, and with the kernels for processors without AVX, losses lie within 1.3e-5 of what is
# recorded, gradient norms within 4e-5, the policy loss, whose terms cancel, within 9e-5. The absolute part is for what
# only rounding makes differ from 0.
CLOSE: dict[str, Callable[[float, float], bool]] = {
    "losses": lambda a, b: math.isclose(a, b, rel_tol=2e-4, abs_tol=2e-6),
    "log_probs": lambda a, b: math.isclose(a, b, rel_tol=0, abs_tol=1e-5),
    "metrics": lambda a, b: math.isclose(a, b, rel_tol=0, abs_tol=1e-12),
}
# Rates are small because Adam makes a whole step of what is only rounding: at those of the mini stages, the fifth mask
# loss of SFT differed by 7 % between two instruction sets of one processor.
COMMON = ("optim.lr=2e-5", "optim.warmup_steps=1", f"optim.steps={STEPS}", "data.num_workers=0", "data.num_frames=4",
          "log.every=1", f"log.save_every={STEPS}", "log.samples_every=0", "log.tensorboard=false",
          "data.root={folder}/world")  # fmt: skip
COT = "data.cot=[{folder}/world/cot/train.jsonl]"
STAGES = {
    "teacher": (COT,),
    "sft": (COT, "sft.teacher_checkpoint={folder}/teacher/final"),
    "reflective": (COT, "init_from={folder}/sft/final", "reflective.paths=[{folder}/reflective.jsonl]",
                   "reflective.standard_count=6"),
    "grpo": ("init_from={folder}/start/final", "grpo.group_size=4", "grpo.max_new_tokens=16", "grpo.temperature=1",
             "grpo.updates_per_batch=3", "optim.steps=6", "log.save_every=6", "optim.lr=1e-4", "grpo.mask_loss_on=all",
             "grpo.reward_module=tests.grpo_cases:length_reward",
             "grpo.reward_weights={format: 1, iou: 1, class: 1, length_reward: 1}"),
}  # fmt: skip
"""Stage -> what differs from configs/mini/<stage>.yaml."""
START = ("model.base={folder}/base", "optim.steps=1", "log.save_every=1", "optim.lr=1e-12", "optim.warmup_steps=0")
"""What makes a teacher's run write `write_base` as GRPO's start."""
TWO = " on 2 processes"
RUNS = (*STAGES, "teacher" + TWO, "grpo" + TWO)


def train_all(folder: Path, *overrides: str) -> None:
    """Every run of RUNS into a folder of its name. Each process is a fork of this one, which has imported all."""
    import_module("librosa.core.audio")  # librosa loads it at first use, for seconds
    make_mini_world(folder / "world", WORLD, progress=False)
    write_reflective(folder)
    write_base(folder / "base")
    train("teacher", folder, "start", *START, *overrides)
    for run in RUNS:
        train(run.removesuffix(TWO), folder, run, *overrides, processes=2 if run.endswith(TWO) else 1)


def train(stage: str, folder: Path, name: str, *overrides: str, processes: int = 1) -> None:
    """train_ds.py with 4 clips a step, as a launcher starts it."""
    options = [*COMMON, *STAGES[stage], f"engine.micro_batch={4 // processes}", f"output_dir={folder / name}"]
    options = [option.replace("{folder}", str(folder)) for option in (*options, *overrides)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}

    def child(rank: int) -> None:
        os.environ.update(shared, MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
        sys.exit(train_ds.main(["--config", f"configs/mini/{stage}.yaml", *options]))

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank,)) for rank in range(processes)]
    for one in children:
        one.start()
    for one in children:
        one.join()
    if any(one.exitcode for one in children):
        sys.exit(f"{name}: train_ds.py failed, see above")


def write_base(folder: Path) -> None:
    """The mini base, but where it would say " the" it asks for a mask as often, and where " a", it stops as often.

    So the answers that GRPO draws differ in length and in masks, without a training that would have to come first.
    """
    shutil.copytree(ROOT / "assets" / "mini_base", folder)
    tokenizer, seg_id = load_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    stop, the, a = tokenizer.convert_tokens_to_ids(["<|im_end|>", "\u0120the", "\u0120a"])
    weights["lm_head.weight"][[seg_id, stop]] = weights["lm_head.weight"][[the, a]]
    save_file(weights, folder / "model.safetensors")


def write_reflective(folder: Path) -> None:
    """Paths of the first six rows: the chain of the row after, a trigger, the row's own chain."""
    lines = (folder / "world" / "cot" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    chains = [json.loads(line) for line in lines]
    with open(folder / "reflective.jsonl", "w", encoding="utf-8") as file:
        for own, other in zip(chains[:6], chains[1:7], strict=True):
            parts = {"wrong": other["reasoning"], "trigger": "Wait, let me check.", "corrected": own["reasoning"]}
            text, spans = " ".join(parts.values()), {}
            for name, part in parts.items():
                spans[name] = (text.rindex(part), text.rindex(part) + len(part))
            file.write(json.dumps({**own, "reasoning": text, "spans": spans}) + "\n")


def losses(*overrides: str, **variables: str) -> dict[str, list[dict[str, float]]]:
    """Rows of metrics.jsonl of every run, without the clock."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.test_golden", "--train", folder, *overrides],
            cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        rows = {run: metrics(Path(folder) / run)[:STEPS] for run in RUNS}
    return {run: [{k: v for k, v in row.items() if k not in CLOCK} for row in found] for run, found in rows.items()}


def log_probs() -> list[list[float]]:
    """One list an answer; prompts read once for the three answers of each group, at another temperature than 1."""
    model, batch = tiny_model().eval(), two_clips()
    packed = model.pack_group(batch, [torch.tensor(answer) for answer in RAGGED], 3, 0.7)
    with torch.no_grad():
        found = model(packed, model.encode(batch)).log_probs
    return [row[mask].tolist() for row, mask in zip(found, packed.mask, strict=True)]


def scores() -> dict[str, list[list[float]]]:
    """Protocol -> [J, F, S] of each of its batches, from 5 rows of 3 frames of half the protocol's size.

    Doubling a few coarse logits is exact in float32 and lands on no threshold, so that no processor rounds otherwise.
    """
    found = {}
    for name, protocol in PROTOCOLS.items():
        side = 48 if protocol.size is None else protocol.size // 2
        draw = np.random.default_rng(5)
        logits = draw.integers(-8, 8, (5, 3, side, side)) + 0.375
        masks = np.zeros(logits.shape, bool)
        for row in range(5):
            top, left = draw.integers(0, side // 2, 2)
            masks[row, :, top : top + side // 3, left : left + side // 4] = True
        logits += 6 * masks
        masks[1] = False  # a clip without a target
        masks[2, 1] = False  # a target that is hidden in one frame
        logits[3] = -1e4  # an answer without a mask
        rows = [(fit_logits(torch.tensor(x).float(), protocol), fit_masks(torch.tensor(y), protocol))
                for x, y in zip(logits, masks, strict=True)]  # fmt: skip
        found[name] = []
        for start in range(0, 5, protocol.rows_per_batch):
            batch = [torch.stack(part) for part in zip(*rows[start : start + protocol.rows_per_batch], strict=True)]
            result = score_batch(*batch, protocol)
            found[name].append([result.j, result.f, result.s])
    return found


def configs() -> dict[str, dict[str, Any]]:
    """Path of a shipped configuration -> all its fields; base files show in what inherits them."""
    root = ROOT / "configs"
    paths = sorted([*root.glob("*.yaml"), *root.glob("lean/*.yaml"), *root.glob("mini/*.yaml")])
    runs = [path for path in paths if path.stem not in ("base", "ablations")]
    return {str(path.relative_to(ROOT)): load_config(path).model_dump(mode="json") for path in runs}


PARTS: dict[str, Callable[[], Any]] = {"losses": losses, "log_probs": log_probs, "metrics": scores, "configs": configs}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys that lead to it, value) of everything in nested dictionaries and lists; empty ones are values."""
    if not value or not isinstance(value, dict | list):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, str(key)))


def moved(part: str, recorded: Any, found: Any) -> list[str]:
    """A line for each recorded value that is another one now; behind them, if there are any, what is new."""
    before, now = dict(leaves(recorded)), dict(leaves(found))
    lines = [
        f"{part}/{'/'.join(path)}: {value!r} -> {now[path]!r}" if path in now else f"{part}/{'/'.join(path)}: gone"
        for path, value in before.items()
        if path not in now or not same(part, value, now[path])
    ]
    new = [f"{part}/{'/'.join(path)}: new, {value!r}" for path, value in now.items() if path not in before]
    return [*lines, *new] if lines else []


def same(part: str, recorded: Any, found: Any) -> bool:
    """Equal, or numbers within the part's tolerance; a NaN equals nothing."""
    if part in CLOSE and isinstance(recorded, float | int) and isinstance(found, float | int):
        return CLOSE[part](recorded, found)
    return recorded == found and type(recorded) is type(found)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_nothing_moved(part: str, golden: dict[str, Any]) -> None:
    lines = moved(part, golden[part], PARTS[part]())
    assert not lines, "\n".join([f"{len(lines)} lines; where it is meant: python -m tests.test_golden --renew", *lines])


def test_a_difference_is_named_and_a_new_field_is_none() -> None:
    recorded = {"a": {"x": 1.0, "y": [1, 2]}, "b": None}
    assert moved("configs", recorded, {"a": {"x": 1.0, "y": [1, 2], "z": 3}, "b": None, "c": 4}) == []
    assert moved("configs", recorded, {"a": {"x": 1.0, "y": [1, 3], "z": 3}}) == [
        "configs/a/y/1: 2 -> 3", "configs/b: gone", "configs/a/z: new, 3"
    ]  # fmt: skip
    assert moved("losses", {"x": 1.0, "y": 0.0}, {"x": 1.0001, "y": 1e-6}) == []
    assert moved("losses", {"x": 1.0, "y": 0.0}, {"x": 1.001, "y": math.nan}) == [
        "losses/x: 1.0 -> 1.001", "losses/y: 0.0 -> nan"
    ]  # fmt: skip


def renew() -> None:
    """Record the numbers of today, and print what moved."""
    before = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    torch.set_num_threads(1)
    after = {}
    for part, compute in PARTS.items():
        found = compute()
        old, now = dict(leaves(before.get(part))), dict(leaves(found))
        different = [p for p in {**old, **now} if p not in old or p not in now or not same(part, old[p], now[p])]
        for path in different:
            print(f"{part}/{'/'.join(path)}: {old.get(path, 'absent')!r} -> {now.get(path, 'absent')!r}")
        after[part] = found if different else before[part]
    GOLDEN.write_text(dumped(after) + "\n", encoding="utf-8")


def dumped(value: Any, depth: int = 3, indent: str = "") -> str:
    """JSON with the outer `depth` levels on lines of their own, so that a difference is a short line."""
    if not depth or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + dumped(x, depth - 1, deeper) for x in value) + f"\n{indent}]"
    lines = (f"{deeper}{json.dumps(key)}: {dumped(x, depth - 1, deeper)}" for key, x in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="record the numbers of today, and print what moved")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="only train, into this folder")
    parser.add_argument("overrides", nargs="*", help="of every run, for --train")
    chosen = parser.parse_intermixed_args()
    if chosen.train:
        train_all(chosen.train, *chosen.overrides)
    elif chosen.renew:
        renew()
    else:
        parser.error("give --renew; the test itself is run by pytest")
