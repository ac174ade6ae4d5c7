"""Reasoning of the metadata rows as JSON Lines: chains of thought, and reflective paths (paper 3.1, 3.2, eq. 3).

    {"row": 12, "uid": "<clip>_cello_1", "reasoning": "In the video ... the target is the cello.", "target": "cello"}

A reflective path is y_wrong + trigger + y_correct, and says where its parts lie, as characters [start, end):

    {..., "reasoning": "<wrong> <trigger> <corrected>",
     "spans": {"wrong": [0, 310], "trigger": [311, 340], "corrected": [341, 650]}}

The released file is one JSON list joined by position with the train rows (AURORA utils/sem_seg_dataset.py:386-407): a
file in another order mislabels silently. Here every record names its row and repeats its uid, and both are checked
(`dataset.released` converts the released files once). "It is [SEG]." is no part of a record: `dataset.prompt` writes it
once, at the end of the answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dataset.refavs import RefAvsIndex
from utils.answers import parse_answer, without_ending
from utils.errors import DataError
from utils.files import write_jsonl

MAX_CHARACTERS = 2000
"""A reasoning of this many characters or more is too long (AURORA utils/sem_seg_dataset.py:398)."""
PARTS = ("wrong", "trigger", "corrected")
_SHOWN = 20
"""Faulty lines that an error names in words."""
_REMEDY = "set data.cot, or run scripts/generate_cot.py"

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
"""The pool x_trigger is drawn from (paper section 3.2 gives the first; the others are our choice: it names no more)."""

_SEG = re.compile(r"\s*\bIt is (?:[a-z][\w -]*? )?\[SEG\]\s*\.?|\s*\[SEG\]", re.IGNORECASE)

TooLong = Literal["error", "drop"]
Target = Literal["reflective", "corrected_only"]
LossOn = Literal["all", "correction"]


@dataclass(frozen=True)
class CotRecord:
    """What one metadata row is trained on."""

    row: int
    uid: str
    reasoning: str
    """Text without the ending "It is [SEG]."."""
    target: str
    """Class that the reasoning arrives at."""
    loss_from: int = 0
    """Character of `reasoning` from which its tokens count in the cross entropy; not written to files."""
    spans: Mapping[str, Sequence[int]] | None = None
    """Of a reflective path: name in PARTS -> its characters [start, end)."""

    def part(self, name: str) -> str:
        """The text of one of PARTS."""
        start, end = self.spans[name]
        return self.reasoning[start:end]


def read_cot(
    paths: Sequence[str | Path], index: RefAvsIndex | None = None, too_long: TooLong = "error"
) -> dict[int, CotRecord]:
    """Chains of thought of one or more files, by metadata row.

    Args:
        paths: JSONL files; blank lines are passed over.
        index: the metadata that rows and uids are checked against; None = not checked.
        too_long: a reasoning of MAX_CHARACTERS or more is reported ("error") or left out ("drop", as in the released
            code).

    Raises:
        DataError: all faulty lines at once (the first 20 in words), each with file, line number, rule and remedy.
    """

    def finish(record: CotRecord, _: dict[str, Any]) -> CotRecord | None:
        return record if fits(record.reasoning, too_long) else None

    return _gather(scan(paths, index), "reasoning", finish)


def read_reflective(
    paths: Sequence[str | Path],
    index: RefAvsIndex | None = None,
    target: Target = "reflective",
    loss_on: LossOn = "all",
) -> dict[int, CotRecord]:
    """Reflective paths of one or more files as training records, by metadata row.

    Args:
        paths: JSONL files as scripts/build_reflective.py writes them.
        index: the metadata that rows and uids are checked against; None = not checked.
        target: the whole path, or its corrected part alone (paper Table 4: CRT, CT).
        loss_on: "all" tokens count in the cross entropy, or those of the "correction" (what follows the trigger).

    Raises:
        DataError: no record, or all faulty lines at once, each with file, line number, rule and remedy.
    """

    def finish(record: CotRecord, fields: dict[str, Any]) -> CotRecord:
        path = replace(record, spans=_checked_spans(record, fields.get("spans")))
        if target == "corrected_only":
            return replace(record, reasoning=path.part("corrected"))
        return replace(path, loss_from=path.spans["corrected"][0] if loss_on == "correction" else 0)

    records = _gather(scan(paths, index, "run scripts/build_reflective.py"), "reflective", finish)
    if not records:
        raise DataError(f"{', '.join(map(str, paths))}: no record. Remedy: mine more failures, or correct more.")
    return records


def write_records(path: str | Path, records: Iterable[CotRecord]) -> None:
    """Write records, one JSON object a line, sorted by row."""
    ordered = sorted(records, key=lambda r: r.row)
    write_jsonl(
        Path(path), ({k: v for k, v in vars(r).items() if k != "loss_from" and v is not None} for r in ordered)
    )


def build_path(
    row: int, uid: str, target: str, wrong: str, corrected: str, seed: int = 0, phrase: str | None = None
) -> CotRecord:
    """Join the parts of a reflective path; the trigger is `phrase`, or depends on (seed, row) alone.

    Raises:
        DataError: a part is empty, or the corrected path does not end in the target.
    """
    parts = [without_seg(wrong), phrase or trigger(row, seed), without_seg(corrected)]
    where, remedy = f"row {row} ({uid})", "Remedy: correct the row again, or leave it out."
    for name, part in zip(PARTS, parts, strict=True):
        if not part:
            raise DataError(f"{where}: the {name} path is empty. {remedy}")
    if parse_answer(parts[2]) != target:
        raise DataError(f"{where}: the corrected path ends in {parse_answer(parts[2])!r}, not in {target!r}. {remedy}")
    spans, start = {}, 0
    for name, part in zip(PARTS, parts, strict=True):
        spans[name] = (start, start + len(part))
        start += len(part) + 1
    return CotRecord(row, uid, " ".join(parts), target, spans=spans)


def trigger(row: int, seed: int) -> str:
    """The trigger phrase of a row."""
    return random.Random(f"{seed}/{row}").choice(TRIGGERS)


def without_seg(text: str) -> str:
    """A path without any "It is [SEG]." or [SEG] in it, and without outer spaces."""
    return _SEG.sub("", text).strip()


# ---- lines and their checks


def numbered_lines(path: Path, remedy: str = _REMEDY) -> list[tuple[int, str]]:
    """(line number from 1, text) of the lines of a JSONL file that are not blank.

    Raises:
        DataError: no such file (with `remedy`), or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Remedy: {remedy}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; the file is UTF-8. Remedy: convert it.") from error
    # split at "\n" alone: str.splitlines would also cut at U+2028, which JSON allows inside a string
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


Line = tuple[str, CotRecord | ValueError, dict[str, Any]]
"""(file and line number, the record or what is wrong with it, all fields of the line)."""


def scan(paths: Iterable[str | Path], index: RefAvsIndex | None = None, remedy: str = _REMEDY) -> Iterator[Line]:
    """Every line of the files with its record; a faulty line comes with its error instead, and the next ones follow.

    Raises:
        DataError: a file is missing (with `remedy`), or not UTF-8.
    """
    for path in paths:
        for line, text in numbered_lines(Path(path), remedy):
            try:
                record, fields = _parse(text, index)
            except ValueError as error:
                record, fields = error, {}
            yield f"{path}, line {line}", record, fields


def fits(reasoning: str, too_long: TooLong) -> bool:
    """Whether a reasoning is short enough to be used.

    Raises:
        ValueError: it is not, and that is an error.
    """
    if len(reasoning) < MAX_CHARACTERS:
        return True
    if too_long == "error":
        raise ValueError(
            f"reasoning has {len(reasoning)} characters; at most {MAX_CHARACTERS - 1} are used. "
            "Remedy: shorten it, or drop long ones by config as the released code does."
        )
    return False


def clean_reasoning(reasoning: object) -> str:
    """The reasoning without outer spaces and without its own "It is [SEG].".

    Raises:
        ValueError: no text, or nothing is left.
    """
    if not isinstance(reasoning, str):
        raise ValueError(f"reasoning = {reasoning!r}; must be text. Remedy: write the chain of thought.")
    text = without_ending(reasoning)
    if not text:
        raise ValueError("reasoning is empty. Remedy: write it anew (scripts/generate_cot.py), or leave the row out.")
    return text


def raise_faults(faults: Sequence[str], kind: str = "reasoning") -> None:
    """DataError with the first of the faults in words, if there are any."""
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError("\n  ".join([f"{len(faults)} faulty {kind} records:", *faults[:_SHOWN]]) + more)


def _gather(
    lines: Iterable[Line], kind: str, finish: Callable[[CotRecord, dict[str, Any]], CotRecord | None]
) -> dict[int, CotRecord]:
    """What `finish` makes of each record (None = left out), by row; DataError with all faulty lines."""
    records: dict[int, CotRecord] = {}
    origin: dict[int, str] = {}
    faults: list[str] = []
    for where, found, fields in lines:
        try:
            if isinstance(found, ValueError):
                raise found
            if found.row in records:
                raise ValueError(
                    f"row {found.row} is given twice, first in {origin[found.row]}. Remedy: keep one of the two."
                )
            record = finish(found, fields)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        if record is not None:
            records[record.row], origin[record.row] = record, where
    raise_faults(faults, kind)
    return records


def _parse(text: str, index: RefAvsIndex | None) -> tuple[CotRecord, dict[str, Any]]:
    """One line as a record, and all its fields. Raises ValueError with rule and remedy."""
    try:
        fields: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error}). Remedy: write one JSON object per line.") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"a {type(fields).__name__}. Remedy: write one object {{row, uid, reasoning, target}} per line."
        )
    for name, kind in (("row", int), ("uid", str), ("reasoning", str), ("target", str)):
        value = fields.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            rule = "a whole number" if kind is int else "text"
            raise ValueError(f"{name} = {value!r}; must be {rule}. Remedy: write it.")
    row, uid, target = fields["row"], fields["uid"], fields["target"].strip()
    if not target:
        raise ValueError("target is empty; it names the class that the reasoning arrives at. Remedy: write it.")
    if index is not None:
        known = index.row(row)
        remedy = "Remedy: use the reasoning file of this metadata.csv."
        if known is None:
            raise ValueError(
                f"row {row} does not exist in the metadata ({index.row_count} rows) or belongs to no split. {remedy}"
            )
        if known.uid != uid:
            raise ValueError(f"row {row} has uid {known.uid!r}, not {uid!r}. {remedy}")
    return CotRecord(row, uid, clean_reasoning(fields["reasoning"]), target), fields


def _checked_spans(record: CotRecord, spans: Any) -> dict[str, list[int]]:
    """Where the parts of a path lie. Raises ValueError with rule and remedy."""
    remedy = "Remedy: run scripts/build_reflective.py again."
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
    return spans
