"""The evaluations below a folder, read back from metrics.json and predictions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import DataError

SPLIT_ORDER = ("val", "test_s", "test_u", "test_n")
MINI_FILES = frozenset({"mini_truth.jsonl", "mini_s4.json"})
"""Only synthetic data (the mini world, its S4) have one of these, so an evaluation that names it was made on them."""
TRAINING_SPLIT = "train"


@dataclass(frozen=True)
class PredictedRow:
    """One line of predictions.jsonl; scores are of this row alone (protocol per_expression), in percent."""

    row: int
    uid: str
    split: str
    reference: str
    kind: str
    class_name: str
    text: str
    answer_class: str | None
    has_seg: bool
    faithful: bool | None
    scores: Mapping[str, float]
    """J and F, or S where nothing answers to the reference."""
    video: str
    """Clip whose frames the language model saw."""
    audio: str
    """Clip whose sound it heard."""
    masks: tuple[dict[str, Any], ...]
    """Predicted COCO RLE per frame."""
    clip: str
    """Folder of the row's own clip."""

    @property
    def is_null(self) -> bool:
        """Whether nothing in the clip answers to the reference."""
        return "S" in self.scores

    @property
    def class_right(self) -> bool | None:
        """Whether the answer names the true class; None where the benchmark tells none (AVSBench MS3)."""
        return self.answer_class == self.class_name if self.class_name else None

    @property
    def jf(self) -> float | None:
        """J&F; None for a null row."""
        return None if "J" not in self.scores else (self.scores["J"] + self.scores["F"]) / 2

    @staticmethod
    def from_json(record: Mapping[str, Any], benchmark: str = "refavs") -> PredictedRow:
        """One line of predictions.jsonl; on Ref-AVS the uid is <clip>_<object>_<number>, on AVSBench the clip."""
        uid = record["uid"]
        return PredictedRow(
            row=record["row"], uid=record["uid"], split=record["split"], reference=record["reference"],
            kind=record["kind"], class_name=record["class_name"], text=record["reasoning"],
            answer_class=record["answer_class"], has_seg=record["has_seg"], faithful=record["faithful"],
            scores={name: record[name] for name in ("J", "F", "S") if name in record},
            video=record["video"], audio=record["audio"], masks=tuple(record["masks"]),
            clip=uid.rsplit("_", 2)[0] if benchmark == "refavs" else uid,
        )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """All splits of one evaluation."""

    name: str
    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
    """Split -> its metrics.json."""
    rows: Mapping[int, PredictedRow]

    def fact(self, name: str, default: Any = None) -> Any:
        """A field of metrics.json that all splits share."""
        return next(iter(self.metrics.values())).get(name, default)

    @property
    def probe(self) -> str:
        return self.fact("probe", "none")

    @property
    def checkpoint(self) -> str:
        """Digest of the weights."""
        return self.fact("checkpoint_sha256", "")

    @property
    def answer(self) -> str:
        """Kind of answer that the checkpoint was trained on."""
        return self.fact("config", {}).get("data", {}).get("answer", "")

    @property
    def data_root(self) -> str | None:
        return self.fact("config", {}).get("data", {}).get("root")

    @property
    def benchmark(self) -> str:
        """data.benchmark: rows of two benchmarks have nothing in common, whatever their numbers."""
        return _benchmark(self.fact("config", {}))

    @property
    def is_mini(self) -> bool:
        """Whether the data are synthetic: the mini world, or S4 made of it."""
        return is_mini(self.fact("files", {}))


def is_mini(files: Iterable[str]) -> bool:
    """Whether an evaluation was made on synthetic data, told by the names of the files that its metrics.json lists.

    Among them is every table in `data.root`; that folder's name may be anything.
    """
    return not MINI_FILES.isdisjoint(files)


def find_evaluations(folder: Path, prefix: str = "") -> list[Evaluation]:
    """The evaluations in `folder`: itself, if it holds <split>/metrics.json, else those at most two levels below.

    What scripts/mine_failures.py evaluated, the training split alone, counts only if it is named itself.

    Args:
        folder: of an evaluation, or of a run with its evaluations.
        prefix: put before each name; a folder's name loses a leading "eval_".

    Raises:
        DataError: a file of an evaluation is missing or cannot be read.
    """
    if _splits(folder):
        return [read_evaluation(folder, prefix or _short(folder))]
    found = [path for depth in ("*", "*/*") for path in sorted(folder.glob(depth)) if path.is_dir() and _splits(path)]
    found = [path for path in found if {file.parent.name for file in _splits(path)} != {TRAINING_SPLIT}]
    found.sort(key=lambda path: min(file.stat().st_mtime for file in _splits(path)))
    return [read_evaluation(path, prefix + _short(path)) for path in found]


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """One evaluation with all its rows.

    Raises:
        DataError: a file is missing or cannot be read; it is named, with the remedy.
    """
    metrics, rows = {}, {}
    order = {split: i for i, split in enumerate(SPLIT_ORDER)}
    for path in sorted(_splits(folder), key=lambda p: (order.get(p.parent.name, len(order)), p.parent.name)):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            benchmark = _benchmark(facts.get("config", {}))
            with open(path.parent / "predictions.jsonl", encoding="utf-8") as lines:
                found = [PredictedRow.from_json(json.loads(line), benchmark) for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path.parent}: no complete evaluation ({error!r}). Remedy: evaluate again.") from error
        metrics[facts["split"]] = facts
        rows.update((row.row, row) for row in found)
    return Evaluation(name, folder, metrics, rows)


def shared_rows(before: Evaluation, after: Evaluation) -> list[int]:
    """Rows that both evaluations predicted, in file order.

    Raises:
        DataError: one number stands for different expressions.
    """
    if before.benchmark != after.benchmark:
        raise DataError(
            f"{before.folder} is of {before.benchmark} and {after.folder} of {after.benchmark}; only evaluations of "
            "one benchmark can be compared. Remedy: name two of one benchmark."
        )
    numbers = sorted(before.rows.keys() & after.rows.keys())
    for number in numbers:
        ours, theirs = before.rows[number], after.rows[number]
        if (ours.uid, ours.reference) != (theirs.uid, theirs.reference):
            raise DataError(
                f"row {number} is {ours.uid} in {before.folder} and {theirs.uid} in {after.folder}; "
                "only evaluations of one metadata.csv can be compared. Remedy: evaluate both on the same data."
            )
    return numbers


def pairs(evaluations: Iterable[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """What is compared by default: each stage with the one before it, each probe with its stage unprobed.

    Both are of one benchmark.
    """
    plain: dict[str, list[Evaluation]] = {}
    probes = []
    for evaluation in evaluations:
        if evaluation.probe == "none":
            plain.setdefault(evaluation.benchmark, []).append(evaluation)
        else:
            probes.append(evaluation)
    found = [pair for several in plain.values() for pair in zip(several, several[1:], strict=False)]
    for probe in probes:
        found += [(base, probe) for base in plain.get(probe.benchmark, []) if base.checkpoint == probe.checkpoint][:1]
    return found


def _benchmark(config: Mapping[str, Any]) -> str:
    return config.get("data", {}).get("benchmark", "refavs")


def _splits(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/metrics.json") if (path.parent / "predictions.jsonl").is_file()]


def _short(folder: Path) -> str:
    return folder.resolve().name.removeprefix("eval_")
