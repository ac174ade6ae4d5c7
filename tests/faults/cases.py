"""What is killed: the four stages, evaluation, mining and correction, one after the other on small data.

Each case starts from what the undisturbed runs of the cases before it left, as in the paper's pipeline. The base is
the one of the mini world; steps, rows and answers are few, because it is the moments between them that count.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import train_ds
import train_ds_test
from dataset.mini.world import WorldSettings, make_mini_world
from dataset.records import numbered_lines
from scripts import build_reflective, correct_paths, mine_failures

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
WORLD = WorldSettings(train=6, val=0, test_s=3, test_u=0, test_n=1, train_null=1, rows_per_train_clip=4,
                      rows_per_test_clip=2)  # fmt: skip
CLOCKS = ("seconds", "per_second")
"""Parts of the names of scalars that tell the time."""
SMALL = ("data.num_frames=2", "data.feature_cache=memory", "data.num_workers=1", "engine.threads=1")
TRAINING = (f"optim.steps={STEPS}", "optim.warmup_steps=1", "engine.micro_batch=2", "log.every=1", "log.save_every=2",
            "log.keep=2", "log.tensorboard=false", *SMALL)  # fmt: skip
GRPO = ("grpo.group_size=2", "grpo.max_new_tokens=12", "log.samples_every=2")
EVALUATION = ("eval.batch_size=2", "eval.max_new_tokens=8", *SMALL)


@dataclass(frozen=True)
class Case:
    """One command, and how its result is read.

    Args:
        name: of the table's line.
        ranks: processes.
        main: (folder) -> exit status.
        work: (folder) -> files that grow with every finished row or step, as glob patterns.
        items: (folder) -> what must be there once each.
        files: (folder) -> what must be equal to the bit, by name.
    """

    name: str
    ranks: int
    main: Callable[[Path], int]
    work: tuple[str, ...]
    items: Callable[[Path], list[Any]]
    files: Callable[[Path], dict[str, bytes]]

    def bytes_of_work(self, folder: Path) -> int:
        """Size of the work that is on disk."""
        sizes = 0
        for pattern in self.work:
            for path in folder.glob(pattern):
                try:
                    sizes += path.stat().st_size
                except FileNotFoundError:  # merged meanwhile
                    continue
        return sizes


def prepare(folder: Path) -> None:
    """The small world, and librosa's sound module, which it loads at first use."""
    importlib.import_module("librosa.core.audio")
    make_mini_world(folder / "data", WORLD, progress=False)


def cases(folder: Path) -> Iterator[Case]:
    """All cases in order; the undisturbed run of each must be in `folder/<name>` before the next one is asked for."""
    train = partial(_training, folder)
    yield train("teacher")
    teacher = f"sft.teacher_checkpoint={folder}/teacher/final"
    yield train("sft", "loss.distill=1", teacher)
    checkpoint = f"eval.checkpoint={folder}/sft/final"
    yield _evaluation(folder, checkpoint)
    yield _mining(folder)
    yield _correction(folder)
    _write_reflective(folder)
    start = f"init_from={folder}/sft/final"
    paths = f"reflective.paths=[{folder}/reflective.jsonl]"
    yield train("reflective", start, paths, "reflective.standard_count=null")
    yield train("grpo", start, *GRPO)


def _training(folder: Path, stage: str, *overrides: str) -> Case:
    fixed = [f"data.root={folder}/data", f"data.cot=[{folder}/data/cot/train.jsonl]", *TRAINING, *overrides]

    def main(run: Path) -> int:
        config = str(ROOT / "configs" / "mini" / f"{stage}.yaml")
        return train_ds.main(["--config", config, f"output_dir={run}", *fixed])

    def items(run: Path) -> list[Any]:
        return [row["step"] for row in _rows(run / "metrics.jsonl")]

    def files(run: Path) -> dict[str, bytes]:
        rows = [{k: v for k, v in row.items() if not any(clock in k for clock in CLOCKS)}
                for row in _rows(run / "metrics.jsonl")]  # fmt: skip
        found = {name: (run / "final" / name).read_bytes() for name in ("adapter_model.safetensors", "trained.json")}
        samples = run / "samples.jsonl"
        found["samples.jsonl"] = samples.read_bytes() if samples.exists() else b""
        return {**found, "metrics.jsonl": json.dumps(rows).encode()}

    return Case(stage, 2, main, ("metrics.jsonl",), items, files)


def _evaluation(folder: Path, checkpoint: str) -> Case:
    config = str(ROOT / "configs" / "mini" / "eval.yaml")
    fixed = ["--config", config, f"data.root={folder}/data", checkpoint, "eval.splits=[test_s,test_n]",
             "eval.pictures=2", *EVALUATION]  # fmt: skip

    def items(run: Path) -> list[Any]:
        return [row["row"] for path in sorted(run.glob("*/predictions.jsonl")) for row in _rows(path)]

    return Case(
        "evaluation",
        2,
        lambda run: train_ds_test.main([*fixed, f"eval.output_dir={run}"]),
        ("*/parts-*/rank*.jsonl", "*/predictions.jsonl"),
        items,
        _all_files,
    )


def _mining(folder: Path) -> Case:
    config = str(ROOT / "configs" / "mini" / "eval.yaml")
    fixed = ["--config", config, "--checkpoint", f"{folder}/sft/final", "--iou", "1", f"data.root={folder}/data"]
    out = "failures.jsonl"
    return Case(
        "mining",
        2,
        lambda run: mine_failures.main([*fixed, *EVALUATION, "--out", str(run / out)]),
        ("*.eval/*/parts-*/rank*.jsonl", "*.eval/*/predictions.jsonl"),
        lambda run: [row["row"] for row in _rows(run / f"{out}.eval" / "train" / "predictions.jsonl")],
        _all_files,
    )


def _correction(folder: Path) -> Case:
    fixed = ["--data", f"{folder}/data", "--failures", f"{folder}/failures.jsonl", "--backend", "mini",
             "--max-ratio", "1", "--mistakes", "0.3", "--concurrency", "2"]  # fmt: skip
    out, refused = "corrections.jsonl", "corrections.jsonl.refused.jsonl"

    def files(run: Path) -> dict[str, bytes]:
        return {name: (run / name).read_bytes() for name in (out, refused)}

    return Case(
        "correction",
        1,
        lambda run: correct_paths.main([*fixed, "--out", str(run / out)]),
        ("*.parts/rank*.jsonl",),
        lambda run: [row["row"] for name in (out, refused) for row in _rows(run / name)],
        files,
    )


def write_failures(folder: Path) -> None:
    """A failure for every training row: the chain of the row after it, which is wrong there."""
    index = correct_paths.RefAvsIndex(folder / "data")
    rows = [row for row in index.rows("train") if not row.is_null]
    chains = {r["row"]: r["reasoning"] for r in _rows(folder / "data" / "cot" / "train.jsonl")}
    lines = [
        {"row": row.row, "uid": row.uid, "reference": row.reference, "kind": row.kind, "target": row.class_name,
         "answer_class": other.class_name, "iou": 0.0, "path": f"{chains[other.row]} It is [SEG]."}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]  # fmt: skip
    (folder / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_reflective(folder: Path) -> None:
    corrections = folder / "correction" / "corrections.jsonl"
    build_reflective.main(["--corrections", str(corrections), "--out", str(folder / "reflective.jsonl")])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in numbered_lines(path, "run the command again")]


def _all_files(run: Path) -> dict[str, bytes]:
    """Every file but locks; the folder's own name, which stands in the settings, is taken out."""
    return {
        str(path.relative_to(run)): path.read_bytes().replace(str(run).encode(), b"RUN")
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }
