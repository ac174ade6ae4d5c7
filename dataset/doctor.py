"""What is wrong or odd in a copy of Ref-AVS: table, reasoning records and media; nothing is ever changed.

The rules are those of the readers (`dataset.refavs`, `dataset.cot`, `dataset.media`), but all faults are gathered
instead of the first being raised. Oddities that the real table is known to have (doubled uids, rows of split TODO) are
notes: they are handled and need no repair. The media of single clips are looked at by `dataset.doctor_media`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataset.cot import MAX_CHARACTERS, numbered_lines, parse_record
from dataset.refavs import RefAvsIndex, Row, Split

ERROR, WARNING, NOTE = "error", "warning", "note"

KINDS: dict[str, tuple[str, str]] = {
    "table": (ERROR, "correct the row, or restore the official metadata.csv"),
    "missing": (ERROR, "restore the file from the benchmark's archive"),
    "broken": (ERROR, "restore the file from the benchmark's archive; it is truncated or no such file format"),
    "wrong size": (ERROR, "restore frames and masks of the clip from one release"),
    "mask values": (ERROR, "write the mask as an 8-bit black (0) and white (255) PNG"),
    "outside": (ERROR, "copy the file into the data set; links out of it are not followed"),
    "reasoning": (ERROR, "correct or remove the line"),
    "reasoning target": (ERROR, "write the row's class as target, or make the record anew (scripts/generate_cot.py)"),
    "split leak": (ERROR, "restore the official metadata.csv: a clip belongs to one split"),
    "object of a null row": (WARNING, "none needed: read as empty, as every null row; look whether the row is one"),
    "empty mask": (WARNING, "look at the clip: no frame shows the object; leave the rows out if the mask is wrong"),
    "silent sound": (WARNING, "listen; extract the sound again unless the clip is silent"),
    "clipped sound": (WARNING, "listen; extract the sound again at a lower level if it is distorted"),
    "still frames": (WARNING, "extract the frames again: all of them are the same picture"),
    "frame count": (WARNING, "restore the clip, or set data.num_frames"),
    "sound length": (WARNING, "extract the clip's sound again"),
    "no reasoning": (WARNING, "run scripts/generate_cot.py, or set data.incomplete_reasoning to drop"),
    "doubled uid": (NOTE, "none needed: rows are keyed by their number, never by uid"),
    "two classes of one object": (NOTE, "none needed; such rows disagree about a name (label noise)"),
    "unused split": (NOTE, "none needed: rows of split TODO are left out"),
    "placeholder text": (NOTE, "leave them out of training if they harm: they refer to nothing"),
    "joined words": (NOTE, "none needed: '_' stands for a space"),
    "unusual characters": (NOTE, "read the expression; annotation tools leave messages"),
    "null leak": (NOTE, "report scripts/dev/text_baseline.py beside test_n: the words alone give null rows away"),
}
"""Kind of finding -> severity and advice."""
_PLACEHOLDERS = ("no.", "no", "none", "n/a", "nan", "null", "todo")
_COMMON_SYMBOLS = frozenset("\u2018\u2019\u201c\u201d\u2013\u2014\u00e9\u00e8")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd."""

    kind: str
    """A key of KINDS."""
    where: str
    """File or row."""
    text: str
    rows: tuple[int, ...] = ()
    """Metadata rows that it touches, as far as they are known."""

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]


@dataclass
class Report:
    """Everything that was found."""

    data: str
    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    """How many rows, clips, frames, masks and sounds were read."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts."""

    def of(self, severity: str) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    def table(self) -> list[list[Any]]:
        """[severity, kind, count, first place] for each kind that was met, errors first."""
        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            groups[finding.kind].append(finding)
        return [[KINDS[k][0], k, len(groups[k]), groups[k][0].where] for k in KINDS if k in groups]

    def to_json(self) -> dict[str, Any]:
        """Plain values: counts by severity and kind, and every finding with its advice."""
        return {
            "data": self.data,
            "checked": self.checked,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "counts": {s: len(self.of(s)) for s in (ERROR, WARNING, NOTE)},
            "kinds": {kind: count for _, kind, count, _ in self.table()},
            "findings": [{**asdict(f), "severity": f.severity, "advice": KINDS[f.kind][1]} for f in self.findings],
        }


def check_table(root: str | Path) -> tuple[RefAvsIndex, list[Finding]]:
    """The index of all rows that can be used, and what is wrong or odd in metadata.csv.

    Raises:
        DataError: there is no table, or it has other columns: nothing can be checked.
    """
    faults: list[str] = []
    index = RefAvsIndex(root, faults)
    found = [Finding("table", str(index.table), text) for text in faults]
    rows = [row for split in Split for row in index.rows(split)]
    found += _uids(index, rows, unread=len(faults))
    found += _leaks(rows)
    for kind, odd in (
        ("placeholder text", lambda text: text.strip().lower() in _PLACEHOLDERS),
        ("joined words", lambda text: "_" in text),
        ("unusual characters", lambda text: any(ord(c) > 126 and c not in _COMMON_SYMBOLS for c in text)),
    ):
        found += [Finding(kind, _place(row), repr(row.reference), (row.row,)) for row in rows if odd(row.reference)]
    return index, found


def _uids(index: RefAvsIndex, rows: Sequence[Row], unread: int) -> list[Finding]:
    """Doubled uids, objects with two names, rows of no split."""
    by_uid: dict[str, list[Row]] = defaultdict(list)
    by_object: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_uid[row.uid].append(row)
        by_object[row.clip, row.fid].append(row)
    found = []
    for uid, same in by_uid.items():
        if len(same) > 1:
            fids = sorted({row.fid for row in same})
            text = f"stands {len(same)} times, with objects {fids} and {len({r.reference for r in same})} texts"
            found.append(Finding("doubled uid", uid, text, tuple(row.row for row in same)))
    for (clip, fid), same in by_object.items():
        names = sorted({row.class_name for row in same})
        if len(names) > 1:
            numbers = tuple(row.row for row in same)
            found.append(Finding("two classes of one object", f"{clip} fid_{fid}", ", ".join(names), numbers))
    unused = index.row_count - len(rows) - unread
    if unused:
        found.append(Finding("unused split", str(index.table), f"{unused} rows"))
    return found


def _leaks(rows: Sequence[Row]) -> list[Finding]:
    """Clips of two splits; null rows that their words give away."""
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.clip].add(str(row.split))
    found = [
        Finding("split leak", clip, f"in splits {', '.join(sorted(names))}")
        for clip, names in splits.items()
        if len(names) > 1
    ]
    null = Counter(row.reference for row in rows if row.is_null)
    other = {row.reference for row in rows if not row.is_null}
    if null and len(null) <= 20:
        shared = sum(text in other for text in null)
        text = f"{null.total()} null rows have {len(null)} texts, {shared} of which any other row has"
        found.append(Finding("null leak", "column exp", text))
    return found


def check_reasoning(paths: Iterable[str | Path], index: RefAvsIndex, split: Split = Split.TRAIN) -> list[Finding]:
    """Records without a row, of another row, unreadable, doubled, too long or with another target than the row's class.

    Raises:
        DataError: a file is missing or not UTF-8.
    """
    found, origin = [], {}
    for path in paths:
        for line, text in numbered_lines(Path(path)):
            where = f"{path}, line {line}"
            try:
                record = parse_record(text, index)
            except ValueError as error:
                found.append(Finding("reasoning", where, str(error)))
                continue
            numbers = (record.row,)
            if record.row in origin:
                found.append(Finding("reasoning", where, f"row {record.row} is in {origin[record.row]} too", numbers))
            origin.setdefault(record.row, where)
            if len(record.reasoning) >= MAX_CHARACTERS:
                found.append(Finding("reasoning", where, f"{len(record.reasoning)} characters", numbers))
            row = index.row(record.row)
            if row is not None and record.target.lower() != row.class_name.lower():
                text = f"target {record.target!r}, but row {row.row} is about {row.class_name!r}"
                found.append(Finding("reasoning target", where, text, numbers))
    missing = tuple(row.row for row in index.rows(split) if row.row not in origin)
    if missing:
        found.append(Finding("no reasoning", f"split {split}", f"{len(missing)} rows have no record", missing))
    return found


def unlike_most(values: dict[str, float], kind: str, unit: str, tolerance: float = 0.0) -> list[Finding]:
    """Clips whose value differs by more than `tolerance` from the most frequent one."""
    if not values:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [
        Finding(kind, clip, f"{value:g} {unit}, most clips have {usual:g}")
        for clip, value in values.items()
        if abs(value - usual) > tolerance
    ]


def _place(row: Row) -> str:
    return f"row {row.row} ({row.uid})"

