"""Failures of a stage-1 checkpoint: rows whose mask and whose reasoning are both wrong (paper section 3.2).

    {"row": 12, "uid": "<clip>_cello_1", "reference": "...", "kind": "audio", "target": "cello", "answer_class": "man",
     "iou": 0.31, "path": "In the video ... So the target is the man. It is [SEG]."}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.cot import numbered_lines
from dataset.refavs import NULL_CLASS
from utils.errors import DataError
from utils.results import decode_masks

IOU = 0.6
"""Rows below it are candidates (paper section 3.2)."""


@dataclass(frozen=True)
class Failure:
    """One mined row."""

    row: int
    uid: str
    reference: str
    kind: str
    """Question kind, or "" where the data does not tell it."""
    target: str
    """True class."""
    answer_class: str | None
    """Class that the answer names, None if none can be parsed."""
    iou: float
    """Mean over frames, in [0, 1], at native size and threshold 0.5."""
    path: str
    """The whole answer, y_wrong."""


def mine(predictions: Iterable[dict[str, Any]], below: float = IOU) -> list[Failure]:
    """Rows with a mean IoU below the threshold and a wrong or unreadable class.

    Args:
        predictions: lines of an evaluation's predictions.jsonl.
        below: in [0, 1].
    """
    found = []
    for line in predictions:
        answer, target = line["answer_class"], line["class_name"]
        iou = _iou(line)
        if iou < below and answer != target:
            same = (line["row"], line["uid"], line["reference"], line["kind"])
            found.append(Failure(*same, target, answer, iou, line["reasoning"]))
    return found


def mining_report(rows: int, failures: list[Failure], kinds: Iterable[str], below: float) -> dict[str, Any]:
    """Counts of a mining run: in all, by question kind and by true class."""
    asked = Counter(kinds)
    mined = Counter(f.kind for f in failures)
    return {
        "rows": rows,
        "mined": len(failures),
        "mined_percent": round(100 * len(failures) / rows, 3) if rows else 0.0,
        "iou_below": below,
        "unreadable": sum(f.answer_class is None for f in failures),
        "by_kind": {kind: {"rows": count, "mined": mined[kind]} for kind, count in sorted(asked.items())},
        "by_class": dict(Counter(f.target for f in failures).most_common()),
    }


def read_failures(path: Path) -> list[Failure]:
    """Failures of a file, in its order.

    Raises:
        DataError: no such file, a faulty line or a row named twice; with the line number.
    """
    found: dict[int, Failure] = {}
    for line, text in numbered_lines(path, "run scripts/mine_failures.py"):
        try:
            failure = Failure(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(f"{path}, line {line}: {error}. Remedy: run scripts/mine_failures.py again.") from error
        if failure.row in found:
            raise DataError(f"{path}, line {line}: row {failure.row} stands twice. Remedy: keep one of the lines.")
        found[failure.row] = failure
    return list(found.values())


def failure_lines(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """Plain values, one per line."""
    return [asdict(f) for f in failures]


def _iou(line: dict[str, Any]) -> float:
    """Mean IoU over frames; a null row's frame is right where the predicted mask is empty."""
    if line["class_name"] != NULL_CLASS:
        return line["J"] / 100
    return float((~decode_masks(line["masks"]).any((1, 2))).mean())
