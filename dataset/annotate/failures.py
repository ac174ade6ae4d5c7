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

from dataset.annotate.backends import Request, choose_frames
from dataset.annotate.prompts import CORRECTOR_FRAMES, fill
from dataset.records import numbered_lines, without_seg
from dataset.refavs import NULL_CLASS, RefAvsIndex
from utils.errors import DataError
from utils.files import write_json, write_jsonl
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
        target, answer = line["class_name"], line["answer_class"]
        if target == NULL_CLASS:  # its frame is right where the predicted mask is empty
            iou = float((~decode_masks(line["masks"]).any((1, 2))).mean())
        else:
            iou = line["J"] / 100
        if iou < below and answer != target:
            same = (line["row"], line["uid"], line["reference"], line["kind"])
            found.append(Failure(*same, target, answer, iou, line["reasoning"]))
    return found


def write_failures(predictions: Path, out: Path, below: float = IOU) -> dict[str, Any]:
    """Filter a finished evaluation of the training rows into `out` and <out>.report.json; returns the report."""
    lines = [json.loads(text) for _, text in numbered_lines(predictions, "run scripts/mine_failures.py again")]
    failures = mine(lines, below)
    asked, mined = Counter(line["kind"] for line in lines), Counter(f.kind for f in failures)
    report = {
        "rows": len(lines),
        "mined": len(failures),
        "mined_percent": round(100 * len(failures) / len(lines), 3) if lines else 0.0,
        "iou_below": below,
        "unreadable": sum(f.answer_class is None for f in failures),
        "by_kind": {kind: {"rows": count, "mined": mined[kind]} for kind, count in sorted(asked.items())},
        "by_class": dict(Counter(f.target for f in failures).most_common()),
    }
    write_jsonl(out, map(asdict, failures))
    write_json(out.with_name(f"{out.name}.report.json"), report)
    return report


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


def failure_requests(index: RefAvsIndex, failures: Iterable[Failure], template: str) -> list[Request]:
    """Ten frames, sound and prompt for each failure.

    Raises:
        DataError: a failure is about a row that the metadata does not have, or has under another uid.
    """
    requests = []
    for failure in failures:
        row = index.row(failure.row)
        if row is None or row.uid != failure.uid:
            raise DataError(f"row {failure.row} is {row and row.uid!r} in {index.root}, {failure.uid!r} in the "
                            "failures. Remedy: mine with this metadata.csv.")  # fmt: skip
        wrong = without_seg(failure.path)
        prompt = fill(template, reference=row.reference, target=row.class_name, wrong=wrong)
        frames = choose_frames(index, row.clip, CORRECTOR_FRAMES)
        requests.append(Request(row, prompt, frames, index.audio_path(row.clip), wrong=failure.path))
    return requests
