"""The index of Ref-AVS Bench: metadata.csv read exactly, without touching any media.

    <root>/metadata.csv                              vid,uid,split,fid,exp (CRLF, one header)
    <root>/media/<clip>/audio.wav
    <root>/media/<clip>/frames/{0..9}.jpg            not zero-padded
    <root>/gt_mask/<clip>/fid_<fid>/0000{0..9}.png   zero-padded, the same 0-based numbers

Three things are easily got wrong, so they are decided here and nowhere else:

* The folder of a row is `uid.rsplit("_", 2)[0]`, not its `vid` (official Ref-AVS loader): null rows own folders
  `null_*`, whose sound differs from the original's. (The released AURORA code joins on `vid`, which gives null rows
  the original sound and, where object 0 exists, a real object's mask.)
* A uid is not a key: 11 uids of the real table occur twice. Rows are named by their number in the file.
* Splits are matched by exact name; the 25 rows marked TODO belong to none.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from utils.errors import DataError

COLUMNS = ("vid", "uid", "split", "fid", "exp")
NULL_CLASS = "null"
UNUSED_SPLIT = "TODO"
_NUMBER = re.compile(r"[0-9]{1,9}")


class Split(str, Enum):
    """The splits of Ref-AVS Bench, by their names in metadata.csv. A member is its name as text, too."""

    TRAIN = "train"
    VAL = "val"
    TEST_S = "test_s"
    """Seen classes."""
    TEST_U = "test_u"
    """Clips with at least one class that training never names."""
    TEST_N = "test_n"
    """Null references: nothing in the clip answers to them."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Row:
    """One referring expression about one object of one clip."""

    row: int
    """0-based position in metadata.csv, header excluded: the key of every result."""
    vid: str
    uid: str
    clip: str
    """Folder below media/ and gt_mask/."""
    split: str
    fid: int
    """Number of the object's mask folder."""
    reference: str
    """Column `exp` without outer spaces."""
    class_name: str
    number: int
    """Last part of the uid: number of the expression for that class and clip."""
    kind: str = ""
    """Question kind, where `mini_truth.jsonl` tells it."""
    truth: dict[str, Any] | None = None
    """Facts of the row, where `mini_truth.jsonl` tells them."""

    @property
    def is_null(self) -> bool:
        """Whether nothing in the clip answers to the reference: the mask is empty by definition."""
        return self.class_name == NULL_CLASS


class RefAvsIndex:
    """All usable rows of one copy of Ref-AVS Bench (or of a world written in its layout).

    Args:
        root: folder with metadata.csv, media/ and gt_mask/; a `mini_truth.jsonl` beside them is read too.
        faults: gets the faults of single rows in words, and those rows are left out; None = the first one is raised.

    Raises:
        DataError: the table breaks a rule; the message names file, row, value, rule and remedy.
    """

    def __init__(self, root: str | Path, faults: list[str] | None = None) -> None:
        self.root = Path(root)
        self.table = self.root / "metadata.csv"
        rows, self.row_count = _read_rows(self.table, faults)
        truths = _read_truths(self.root / "mini_truth.jsonl", {r.row for r in rows})
        self._rows = {r.row: replace(r, **truths.get(r.row, {})) for r in rows}

    def rows(self, split: Split | str) -> list[Row]:
        """Rows of a split in file order."""
        wanted = Split(split)
        return [row for row in self._rows.values() if row.split == wanted]

    def row(self, number: int) -> Row | None:
        """The row of that number, or None if it does not exist or belongs to no split."""
        return self._rows.get(number)

    def clips(self, split: Split | str) -> list[str]:
        """Distinct clips of a split, in order of first mention."""
        return list(dict.fromkeys(r.clip for r in self.rows(split)))

    def frames_folder(self, clip: str) -> Path:
        """Raises DataError where a link leads out of media/; so do the two below."""
        return contained(self.root / "media" / clip / "frames", self.root / "media")

    def audio_path(self, clip: str) -> Path:
        return contained(self.root / "media" / clip / "audio.wav", self.root / "media")

    def mask_folder(self, row: Row) -> Path:
        return contained(self.root / "gt_mask" / row.clip / f"fid_{row.fid}", self.root / "gt_mask")


def contained(path: Path, home: Path) -> Path:
    """`path`, if it lies below `home` once links are followed (`home` itself may be a link, as to another disk).

    Raises:
        DataError: a link leads out of `home`, or round in a circle.
    """
    try:
        inside = path.resolve().is_relative_to(home.resolve())
    except (OSError, RuntimeError) as error:  # a circle of links
        raise DataError(f"{path}: cannot be followed ({error}). Remedy: replace the link by the file.") from error
    if not inside:
        raise DataError(
            f"{path}: leads out of {home} to {path.resolve()}; links out of the data are not followed. "
            "Remedy: copy the file there, or make the folder media or gt_mask itself the link."
        )
    return path


def is_folder_name(text: str) -> bool:
    """Whether a cell names one folder below the data's root, and cannot lead anywhere else."""
    return text not in ("", ".", "..") and not any(c in text for c in "/\\\0:")


def split_uid(uid: str) -> tuple[str, str, int]:
    """`<clip>_<class>_<n>` -> (clip, class, n), split from the right: clips may hold '_' and begin with '-'.

    Raises:
        ValueError: the uid does not have this form, or the clip is not the name of one folder.
    """
    parts = uid.rsplit("_", 2)
    if len(parts) != 3 or not all(parts) or not _NUMBER.fullmatch(parts[2]):
        raise ValueError("a uid has the form <clip>_<class>_<number>")
    if not is_folder_name(parts[0]):
        raise ValueError("a clip is the name of one folder below media/, without '/', '\\', ':' or '..'")
    return parts[0], parts[1], int(parts[2])


def read_table(path: Path) -> list[list[str]]:
    """Cells of a benchmark's CSV, the header first, without blank lines.

    Raises:
        DataError: no such file, or not comma-separated UTF-8.
    """
    try:
        # utf-8-sig: a byte-order mark (a spreadsheet's work) is dropped; newline="" leaves CRLF to the csv module
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [record for record in csv.reader(file, strict=True) if record]
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; the data's root holds it. Remedy: set data.root.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: {error}; the table is comma-separated UTF-8. Remedy: restore the official table."
        ) from error


def row_fault(table: Path, number: int, field: str, value: object, rule: str) -> DataError:
    """The error of one cell of a benchmark's table."""
    return DataError(
        f"{table}, row {number} (0-based, header excluded), {field} = {value!r}: {rule}. "
        "Remedy: correct the row, or restore the official table."
    )


def _read_rows(path: Path, faults: list[str] | None) -> tuple[list[Row], int]:
    """Rows of known splits, and the number of all rows of the file."""
    header, *lines = read_table(path) or [[]]
    if sorted(header) != sorted(COLUMNS):
        raise DataError(
            f"{path}: columns are {header}; they must be {list(COLUMNS)}. Remedy: restore the official metadata.csv."
        )
    rows = []
    for number, values in enumerate(lines):
        try:
            rows.append(_read_row(path, number, header, values))
        except DataError as error:
            if faults is None:
                raise
            faults.append(str(error))
    return [r for r in rows if r is not None], len(lines)


def _read_row(path: Path, number: int, header: list[str], values: list[str]) -> Row | None:
    fault = partial(row_fault, path, number)
    if len(values) != len(header):
        raise fault("cells", values, f"a row has {len(header)} cells, this one has {len(values)}")
    cell = dict(zip(header, values, strict=True))
    if cell["split"] == UNUSED_SPLIT:
        return None
    if cell["split"] not in list(Split):
        raise fault("split", cell["split"], f"a split is one of {', '.join(Split)} (or {UNUSED_SPLIT}: left out)")
    if not _NUMBER.fullmatch(cell["fid"]):
        raise fault("fid", cell["fid"], "an object number is a whole number from 0")
    reference = cell["exp"].strip()
    if not reference:
        raise fault("exp", cell["exp"], "a referring expression is not empty")
    try:
        clip, class_name, count = split_uid(cell["uid"])
    except ValueError as error:
        raise fault("uid", cell["uid"], str(error)) from error
    split, fid = Split(cell["split"]), int(cell["fid"])
    return Row(number, cell["vid"], cell["uid"], clip, split, fid, reference, class_name, count)


def _read_truths(path: Path, rows: set[int]) -> dict[int, dict[str, Any]]:
    """row -> its `kind` and `truth` in the mini world; empty where the file is absent (real data)."""
    if not path.is_file():
        return {}
    truths: dict[int, dict[str, Any]] = {}
    remedy = "Remedy: write the mini world anew (scripts/make_mini_world.py)."
    # split at "\n" alone: str.splitlines would also cut at U+2028, which JSON allows inside a string
    for line, text in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(text)
            number, truth = record["row"], {name: record[name] for name in ("kind", "truth")}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {line}: {error!r}; a line is JSON {{row, kind, truth}}. {remedy}") from error
        if number not in rows or number in truths:
            raise DataError(f"{path}, line {line}: row {number!r} is unknown or named twice. {remedy}")
        truths[number] = truth
    missing = rows - truths.keys()
    if missing:
        raise DataError(f"{path}: {len(missing)} rows have no line, the first is row {min(missing)}. {remedy}")
    return truths
