"""Reasoning records: JSON Lines keyed by metadata row.

    {"row": 12, "uid": "<clip>_cello_1", "reasoning": "In the video ... the target is the cello.", "target": "cello"}

The published file is one JSON list joined by position with the train rows (AURORA utils/sem_seg_dataset.py:386-407): a
file in another order mislabels silently. Here every record names its row and repeats its uid, and both are checked.
`import_published` converts the published file once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataset.refavs import RefAvsIndex, Row, Split
from utils.answers import plain_conclusion, without_ending
from utils.errors import DataError

MAX_CHARACTERS = 2000
"""A reasoning of this many characters or more is too long (AURORA utils/sem_seg_dataset.py:398)."""
_SHOWN = 20
_log = logging.getLogger("aurora.data")

TooLong = Literal["error", "drop"]


@dataclass(frozen=True)
class CotRecord:
    """The chain of thought of one metadata row."""

    row: int
    uid: str
    reasoning: str
    """Text without the ending "It is [SEG].", which `dataset.prompt` writes."""
    target: str
    """Class that the reasoning arrives at."""
    loss_from: int = 0
    """Character of `reasoning` from which its tokens count in the cross entropy (`dataset.reflective`); not written."""


def read_cot(
    paths: Sequence[str | Path], index: RefAvsIndex | None = None, too_long: TooLong = "error"
) -> dict[int, CotRecord]:
    """Records of one or more files, by metadata row.

    Args:
        paths: JSONL files; blank lines are passed over.
        index: the metadata that rows and uids are checked against; None = not checked.
        too_long: a reasoning of MAX_CHARACTERS or more is reported ("error") or left out ("drop", as published).

    Raises:
        DataError: all faulty lines at once (the first 20 in words), each with file, line number, rule and remedy.
    """
    records: dict[int, CotRecord] = {}
    origin: dict[int, str] = {}
    faults: list[str] = []
    for path in paths:
        for line, text in numbered_lines(Path(path)):
            where = f"{path}, line {line}"
            try:
                record = parse_record(text, index)
                if record.row in records:
                    raise ValueError(
                        f"row {record.row} is given in {origin[record.row]} too. Remedy: keep one of the two."
                    )
            except ValueError as error:
                faults.append(f"{where}: {error}")
                continue
            if len(record.reasoning) >= MAX_CHARACTERS:
                if too_long == "error":
                    faults.append(f"{where}: {_long(record.reasoning)}")
                continue
            records[record.row] = record
            origin[record.row] = where
    raise_faults(faults)
    return records


def write_cot(path: str | Path, records: Iterable[CotRecord]) -> None:
    """Write records, one JSON object a line, sorted by row."""
    names = ("row", "uid", "reasoning", "target")
    ordered = sorted(records, key=lambda r: r.row)
    lines = (json.dumps({name: getattr(r, name) for name in names}, ensure_ascii=False) for r in ordered)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def import_published(
    path: str | Path, index: RefAvsIndex, split: Split = Split.TRAIN, too_long: TooLong = "error"
) -> list[CotRecord]:
    """Records of the published positional list: element i belongs to the i-th row of the split in file order.

    Conclusions such as "the correct target is “X”" (the example of the paper's section 6.1) become "the target is X.",
    the words of section 3.1; their number is logged.

    Args:
        path: a JSON list of objects with the key `reasoning`.
        index: the official metadata; its rows of `split` (14,113 for train) must be as many as the elements.
        split: the split that the file was made for.
        too_long: as in `read_cot`; too long elements are counted but left out with "drop", as published.

    Returns:
        Records in file order, the target being the row's class.

    Raises:
        DataError: not such a list, another number of elements, an empty or too long reasoning (with its position).
    """
    path = Path(path)
    rows = index.rows(split)
    try:
        elements = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. Remedy: download the published reasoning file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid JSON ({error}). Remedy: download the published file again.") from error
    if not isinstance(elements, list) or len(elements) != len(rows):
        found = f"{len(elements)} elements" if isinstance(elements, list) else f"a {type(elements).__name__}"
        raise DataError(
            f"{path}: {found}, but split {split} has {len(rows)} rows; the file is a list joined by position. "
            "Remedy: use the reasoning file and the metadata.csv of one release."
        )
    records, faults, changed = [], [], 0
    for position, (element, row) in enumerate(zip(elements, rows, strict=True)):
        where = f"{path}, element {position} (row {row.row}, {row.uid})"
        reasoning = element.get("reasoning") if isinstance(element, dict) else None
        try:
            text = _clean(reasoning)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        if len(text) < MAX_CHARACTERS:
            plain = plain_conclusion(text)
            changed += plain != text
            records.append(CotRecord(row.row, row.uid, plain, row.class_name))
        elif too_long == "error":
            faults.append(f"{where}: {_long(text)}")
    raise_faults(faults)
    _log.info('%d of %d conclusions rewritten as "the target is X."', changed, len(records))
    return records


def rows_with_reasoning(rows: Iterable[Row], records: Mapping[int, CotRecord]) -> list[Row]:
    """Those rows that have a record, in their order."""
    return [row for row in rows if row.row in records]


def numbered_lines(path: Path, remedy: str = "set data.cot, or run scripts/generate_cot.py") -> list[tuple[int, str]]:
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


def parse_record(text: str, index: RefAvsIndex | None) -> CotRecord:
    """One line as a record; further keys are passed over.

    Raises:
        ValueError: with rule and remedy.
    """
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
    if not fields["target"].strip():
        raise ValueError("target is empty; it names the class that the reasoning arrives at. Remedy: write it.")
    row, uid = fields["row"], fields["uid"]
    if index is not None:
        known = index.row(row)
        if known is None:
            raise ValueError(
                f"row {row} does not exist in the metadata ({index.row_count} rows) or belongs to no split. "
                "Remedy: use the reasoning file of this metadata.csv."
            )
        if known.uid != uid:
            raise ValueError(
                f"row {row} has uid {known.uid!r}, not {uid!r}. Remedy: use the reasoning file of this metadata.csv."
            )
    return CotRecord(row, uid, _clean(fields["reasoning"]), fields["target"].strip())


def _clean(reasoning: object) -> str:
    """The reasoning without outer spaces and without its own "It is [SEG]."."""
    if not isinstance(reasoning, str):
        raise ValueError(f"reasoning = {reasoning!r}; must be text. Remedy: write the chain of thought.")
    text = without_ending(reasoning)
    if not text:
        raise ValueError("reasoning is empty. Remedy: write it anew (scripts/generate_cot.py), or leave the row out.")
    return text


def _long(reasoning: str) -> str:
    return (
        f"reasoning has {len(reasoning)} characters; at most {MAX_CHARACTERS - 1} are used. "
        "Remedy: shorten it, or drop long ones by config as the published code does."
    )


def raise_faults(faults: list[str], kind: str = "reasoning") -> None:
    """DataError with the first of the faults in words, if there are any."""
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError("\n  ".join([f"{len(faults)} faulty {kind} records:", *faults[:_SHOWN]]) + more)
