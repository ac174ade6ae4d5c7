"""Reflective paths: y_reflective = y_wrong + trigger + y_correct (paper section 3.2, eq. 3), as JSON Lines.

    {"row": 12, "uid": "<clip>_cello_1", "target": "cello", "reasoning": "<wrong> <trigger> <corrected>",
     "spans": {"wrong": [0, 310], "trigger": [311, 340], "corrected": [341, 650]}}

Spans are character positions [start, end) in `reasoning`. As everywhere, "It is [SEG]." is no part of a record:
`dataset.prompt` writes it once, at the end of the answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataset.cot import CotRecord, numbered_lines, parse_record, raise_faults
from dataset.refavs import RefAvsIndex
from utils.answers import parse_answer
from utils.errors import DataError

PARTS = ("wrong", "trigger", "corrected")

TRIGGERS = (
    "Wait, let me re-evaluate.",
    "Wait, let me check this again.",
    "Hold on, something does not fit.",
    "Hmm, I should look at the evidence once more.",
    "On second thought, this may be wrong.",
    "Let me reconsider.",
    "Let me go through this again.",
    "Actually, let me verify each step.",
    "But is that right? Let me check.",
    "Wait, I may have made a mistake.",
    "Let me double-check the audio and the images.",
    "Hmm, that does not match what is heard and seen.",
    "I need to revise this.",
    "Let me correct my reasoning.",
    "Wait, that was too quick.",
    "Looking again, I notice an error.",
    "Before I answer, let me re-examine the clip.",
    "Thinking about it again, I see a flaw.",
    "Hold on, let me listen and look again.",
    "No, that cannot be right. Let me start over.",
    "Let me question that conclusion.",
    "Wait, let me compare this with the reference again.",
    "Let me step back and review.",
    "I should not rely on habit here; let me look at the clip itself.",
)
"""The pool x_trigger is drawn from (paper section 3.2 gives the first; the others are ours)."""

_ENDING = re.compile(r"\s*\bIt is (?:[a-z][\w -]*? )?\[SEG\]\s*\.?|\s*\[SEG\]", re.IGNORECASE)

Target = Literal["reflective", "corrected_only"]
LossOn = Literal["all", "correction"]


@dataclass(frozen=True)
class ReflectivePath:
    """One path with its parts known."""

    row: int
    uid: str
    target: str
    reasoning: str
    spans: Mapping[str, tuple[int, int]]

    def part(self, name: str) -> str:
        """The text of one of PARTS."""
        start, end = self.spans[name]
        return self.reasoning[start:end]

    def to_json(self) -> dict[str, Any]:
        """Plain values of one line."""
        spans = {name: list(self.spans[name]) for name in PARTS}
        return {
            "row": self.row, "uid": self.uid, "target": self.target, "reasoning": self.reasoning, "spans": spans
        }  # fmt: skip


def without_seg(text: str) -> str:
    """A path without any "It is [SEG]." or [SEG] in it, and without outer spaces."""
    return _ENDING.sub("", text).strip()


def build_path(
    row: int, uid: str, target: str, wrong: str, corrected: str, seed: int = 0, phrase: str | None = None
) -> ReflectivePath:
    """Join the parts; the trigger is `phrase`, or depends on (seed, row) alone.

    Raises:
        DataError: a part is empty, or the corrected path does not end in the target.
    """
    parts = [without_seg(wrong), phrase or trigger(row, seed), without_seg(corrected)]
    where = f"row {row} ({uid})"
    if not parts[0] or not parts[2]:
        empty = "wrong" if not parts[0] else "corrected"
        raise DataError(f"{where}: the {empty} path is empty. Remedy: correct the row again, or leave it out.")
    if parse_answer(parts[2]) != target:
        raise DataError(
            f"{where}: the corrected path ends in {parse_answer(parts[2])!r}, not in {target!r}. "
            "Remedy: correct the row again, or leave it out."
        )
    spans, start = {}, 0
    for name, part in zip(PARTS, parts, strict=True):
        spans[name] = (start, start + len(part))
        start += len(part) + 1
    return ReflectivePath(row, uid, target, " ".join(parts), spans)


def trigger(row: int, seed: int) -> str:
    """The trigger phrase of a row."""
    return random.Random(f"{seed}/{row}").choice(TRIGGERS)


def write_reflective(path: str | Path, paths: Iterable[ReflectivePath]) -> None:
    """One JSON object a line, sorted by row."""
    lines = (json.dumps(p.to_json(), ensure_ascii=False) for p in sorted(paths, key=lambda p: p.row))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_reflective(
    paths: Sequence[str | Path],
    index: RefAvsIndex | None = None,
    target: Target = "reflective",
    loss_on: LossOn = "all",
) -> dict[int, CotRecord]:
    """Training records by metadata row.

    Args:
        paths: JSONL files as `write_reflective` writes them.
        index: the metadata that rows and uids are checked against; None = not checked.
        target: the whole path, or its corrected part alone (paper Table 4: CRT, CT).
        loss_on: "all" tokens count in the cross entropy, or those of the "correction" (what follows the trigger).

    Raises:
        DataError: all faulty lines at once, each with file, line number, rule and remedy.
    """
    records: dict[int, CotRecord] = {}
    faults: list[str] = []
    for path in paths:
        for line, text in numbered_lines(Path(path), "run scripts/build_reflective.py"):
            try:
                found = _parse(text, index)
                if found.row in records:
                    raise ValueError(f"row {found.row} is given twice. Remedy: keep one of the two.")
            except ValueError as error:
                faults.append(f"{path}, line {line}: {error}")
                continue
            if target == "corrected_only":
                records[found.row] = CotRecord(found.row, found.uid, found.part("corrected"), found.target)
            else:
                start = found.spans["corrected"][0] if loss_on == "correction" else 0
                records[found.row] = CotRecord(found.row, found.uid, found.reasoning, found.target, start)
    raise_faults(faults, "reflective")
    if not records:
        raise DataError(f"{', '.join(map(str, paths))}: no record. Remedy: mine more failures, or correct more.")
    return records


def _parse(text: str, index: RefAvsIndex | None) -> ReflectivePath:
    """Raises ValueError with rule and remedy."""
    record = parse_record(text, index)
    remedy = "Remedy: run scripts/build_reflective.py again."
    spans = json.loads(text).get("spans")
    if not isinstance(spans, dict) or set(spans) != set(PARTS):
        raise ValueError(f"spans must name {', '.join(PARTS)}. {remedy}")
    last = 0
    for name in PARTS:
        span = spans[name]
        if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)):
            raise ValueError(f"spans.{name} = {span!r}; must be [start, end]. {remedy}")
        if not last <= span[0] < span[1] <= len(record.reasoning):
            raise ValueError(f"spans.{name} = {span}; the parts follow each other inside the reasoning. {remedy}")
        last = span[1]
    if last != len(record.reasoning):
        raise ValueError(f"spans.corrected ends at {last}, the reasoning at {len(record.reasoning)}. {remedy}")
    if parse_answer(record.reasoning) != record.target:
        raise ValueError(f"the path does not end in the target {record.target!r}. {remedy}")
    return ReflectivePath(record.row, record.uid, record.target, record.reasoning,
                          {name: tuple(spans[name]) for name in PARTS})  # fmt: skip
