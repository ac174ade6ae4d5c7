"""Is this copy of Ref-AVS sound? Reads everything once, in parallel; reports and advises, and never changes a file.

    python scripts/check_data.py --data data/refavs                         # table, reasoning records, all media
    python scripts/check_data.py --data data/refavs --metadata-only         # the table alone, seconds
    python scripts/check_data.py --data data/refavs --cot cot/a.jsonl --json report.json

Reasoning records in DATA/cot/train*.jsonl are read unless --cot names others. Exit status: 0 nothing wrong (warnings
and notes may stand), 1 errors, 2 the check itself could not run.

The rules are those of the readers (`dataset.refavs`, `dataset.records`, `dataset.media`), but all faults are gathered
instead of the first being raised. Oddities that the real table is known to have (doubled uids, rows of split TODO) are
notes: they are handled and need no repair.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import DataConfig  # noqa: E402 - the project's root must be on the path first
from dataset.media import SAMPLE_RATE, list_images, read_audio, read_image  # noqa: E402
from dataset.records import MAX_CHARACTERS, scan  # noqa: E402
from dataset.refavs import RefAvsIndex, Row, Split  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.progress import counted  # noqa: E402
from utils.tables import format_table  # noqa: E402

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
SHOWN = 20
"""Findings that are printed in words without --all."""
PLACEHOLDERS = ("no.", "no", "none", "n/a", "nan", "null", "todo")
COMMON_SYMBOLS = frozenset("\u2018\u2019\u201c\u201d\u2013\u2014\u00e9\u00e8")
# thresholds of sounds are our choice: the benchmark has no rule for them
SILENT_PEAK = 1e-3
"""A sound that never rises above it (-60 dB of full scale) is called silent."""
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 0.01
"""A sound is called clipped when this share of its samples stands at this level or above."""
LENGTH_TOLERANCE = 0.25
"""Seconds by which a sound may differ from the usual length."""


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
class Clip:
    """The files of one clip, and what was found in them."""

    name: str
    frames_folder: Path
    audio: Path
    objects: list[tuple[Path, bool, tuple[int, ...]]]
    """(mask folder, whether only null rows name it, metadata rows)."""
    rows: tuple[int, ...]
    findings: list[Finding] = field(default_factory=list)
    frames: int = 0
    masks: int = 0
    seconds: float | None = None
    """Length of the sound; None where it cannot be read."""

    def add(self, kind: str, where: Path, text: str, rows: tuple[int, ...] | None = None) -> None:
        self.findings.append(Finding(kind, str(where), text, self.rows if rows is None else rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv, media/ and gt_mask/")
    parser.add_argument("--cot", type=Path, nargs="*", help="JSONL files (default: DATA/cot/train*.jsonl)")
    parser.add_argument("--metadata-only", action="store_true", help="table and reasoning records, no media")
    parser.add_argument("--json", type=Path, help="write every finding to this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="reading processes; 0 = this one")
    parser.add_argument("--max-image-pixels", type=int, default=defaults.max_image_pixels)
    parser.add_argument("--max-audio-seconds", type=float, default=defaults.max_audio_seconds)
    parser.add_argument("--all", action="store_true", help="print every finding, not only the first ones")
    options = parser.parse_args(arguments)
    return run_command(lambda: check(options), failed=2)


def check(options: argparse.Namespace) -> int:
    """Print what was found; returns 1 where something is wrong."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    index, findings = check_table(options.data)
    checked = {"rows": index.row_count}
    seconds["table"] = time.perf_counter() - began
    records = options.cot if options.cot is not None else sorted((options.data / "cot").glob("train*.jsonl"))
    findings += check_reasoning(records, index, Split.TRAIN) if records else []
    seconds["reasoning"] = time.perf_counter() - began - seconds["table"]
    if not options.metadata_only:
        findings += check_media(index, options, checked)
    seconds["media"] = time.perf_counter() - began - sum(seconds.values())
    report = summary(options.data, findings, checked, seconds)
    if options.json is not None:
        write_json(options.json, report)
    show(report, findings, everything=options.all)
    return 1 if report["counts"][ERROR] else 0


def summary(
    data: Path, findings: Sequence[Finding], checked: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    """The report as plain values: counts by severity and kind, and every finding with its advice.

    Args:
        data: the folder.
        findings: everything that was found.
        checked: how many rows, clips, frames, masks and sounds were read.
        seconds: wall time of the parts.
    """
    severities, kinds = Counter(f.severity for f in findings), Counter(f.kind for f in findings)
    return {
        "data": str(data),
        "checked": checked,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "counts": {severity: severities[severity] for severity in (ERROR, WARNING, NOTE)},
        "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds},
        "findings": [{**asdict(f), "severity": f.severity, "advice": KINDS[f.kind][1]} for f in findings],
    }


def show(report: dict[str, Any], findings: Sequence[Finding], everything: bool) -> None:
    """Print a table by kind, the findings in words, and advice."""
    first = {f.kind: f.where for f in reversed(findings)}
    rows = [[KINDS[kind][0], count, kind, first[kind]] for kind, count in report["kinds"].items()]
    if rows:
        print(format_table(["", "count", "finding", "first"], rows))
    told = [f for f in findings if f.severity != NOTE or everything]
    for finding in told if everything else told[:SHOWN]:
        print(f"{finding.severity}: {finding.kind}: {finding.where}: {finding.text}")
    if not everything and len(told) > SHOWN:
        print(f"and {len(told) - SHOWN} more (--all, --json)")
    for kind in report["kinds"]:
        if KINDS[kind][0] != NOTE:
            print(f"advice on {kind!r}: {KINDS[kind][1]}")
    read = ", ".join(f"{count:,} {name}" for name, count in report["checked"].items())
    counts = ", ".join(f"{severity}s: {count}" for severity, count in report["counts"].items())
    print(f"{read} read in {sum(report['seconds'].values()):.1f} s; {counts}")


# ---- table and reasoning records


def check_table(root: str | Path) -> tuple[RefAvsIndex, list[Finding]]:
    """The index of all rows that can be used, and what is wrong or odd in metadata.csv.

    Raises:
        DataError: there is no table, or it has other columns: nothing can be checked.
    """
    faults: list[str] = []
    index = RefAvsIndex(root, faults)
    table, rows = str(index.table), [row for split in Split for row in index.rows(split)]
    found = [Finding("table", table, text) for text in faults]
    by_uid, by_object, by_clip = (defaultdict(list) for _ in range(3))
    for row in rows:
        by_uid[row.uid].append(row)
        by_object[row.clip, row.fid].append(row)
        by_clip[row.clip].append(row)
    for uid, same in by_uid.items():
        if len(same) > 1:
            fids = sorted({row.fid for row in same})
            text = f"stands {len(same)} times, with objects {fids} and {len({r.reference for r in same})} texts"
            found.append(Finding("doubled uid", uid, text, _numbers(same)))
    for (clip, fid), same in by_object.items():
        names = sorted({row.class_name for row in same})
        if len(names) > 1:
            place = f"{clip} fid_{fid}"
            found.append(Finding("two classes of one object", place, ", ".join(names), _numbers(same)))
    unused = index.row_count - len(rows) - len(faults)
    if unused:
        found.append(Finding("unused split", table, f"{unused} rows"))
    for clip, same in by_clip.items():
        names = sorted({str(row.split) for row in same})
        if len(names) > 1:
            found.append(Finding("split leak", clip, f"in splits {', '.join(names)}"))
    null = Counter(row.reference for row in rows if row.is_null)
    if 0 < len(null) <= 20:  # a few fixed phrases: whoever reads the words alone finds the null rows
        other = {row.reference for row in rows if not row.is_null}
        text = f"{null.total()} null rows have {len(null)} texts, {len(null.keys() & other)} of which any other row has"
        found.append(Finding("null leak", "column exp", text))
    for kind, odd in (
        ("placeholder text", lambda text: text.strip().lower() in PLACEHOLDERS),
        ("joined words", lambda text: "_" in text),
        ("unusual characters", lambda text: any(ord(c) > 126 and c not in COMMON_SYMBOLS for c in text)),
    ):
        places = [(row, f"row {row.row} ({row.uid})") for row in rows if odd(row.reference)]
        found += [Finding(kind, place, repr(row.reference), (row.row,)) for row, place in places]
    return index, found


def check_reasoning(paths: Iterable[str | Path], index: RefAvsIndex, split: Split) -> list[Finding]:
    """Records without a row, of another row, unreadable, doubled, too long or with another target than the row's class.

    Raises:
        DataError: a file is missing or not UTF-8.
    """
    found, origin = [], {}
    for where, record, _ in scan(paths, index):
        if isinstance(record, ValueError):
            found.append(Finding("reasoning", where, str(record)))
            continue
        numbers, row = (record.row,), index.row(record.row)
        if record.row in origin:
            found.append(Finding("reasoning", where, f"row {record.row} is in {origin[record.row]} too", numbers))
        origin.setdefault(record.row, where)
        if len(record.reasoning) >= MAX_CHARACTERS:
            found.append(Finding("reasoning", where, f"{len(record.reasoning)} characters", numbers))
        if record.target.lower() != row.class_name.lower():
            text = f"target {record.target!r}, but row {row.row} is about {row.class_name!r}"
            found.append(Finding("reasoning target", where, text, numbers))
    missing = [row for row in index.rows(split) if row.row not in origin]
    if missing:
        text = f"{len(missing)} rows have no record"
        found.append(Finding("no reasoning", f"split {split}", text, _numbers(missing)))
    return found


def _numbers(rows: Iterable[Row]) -> tuple[int, ...]:
    return tuple(row.row for row in rows)


# ---- media


def check_media(index: RefAvsIndex, options: argparse.Namespace, checked: dict[str, int]) -> list[Finding]:
    """What is wrong or odd in the frames, masks and sounds; how many were read is added to `checked`.

    Raises:
        DataError: a reading process was killed.
    """
    found: list[Finding] = []
    try:
        clips = _clips(index, found)
        clips = list(counted(_read(clips, options), len(clips), "media", "clips"))
    except BrokenProcessPool as error:
        raise DataError(
            f"{index.root}: a reading process was killed, most likely for memory. Remedy: fewer --workers, or lower "
            "--max-image-pixels and --max-audio-seconds."
        ) from error
    found += [finding for clip in clips for finding in clip.findings]
    counts = {clip.name: clip.frames for clip in clips if clip.frames}
    lengths = {clip.name: round(clip.seconds, 1) for clip in clips if clip.seconds is not None}
    checked |= {"clips": len(clips), "frames": sum(counts.values()), "masks": sum(clip.masks for clip in clips),
                "sounds": len(lengths)}  # fmt: skip
    for kind, values, unit, tolerance in (
        ("frame count", counts, "frames", 0),
        ("sound length", lengths, "s", LENGTH_TOLERANCE),
    ):
        usual = Counter(values.values()).most_common(1)[0][0] if values else 0
        for name, value in values.items():
            if abs(value - usual) > tolerance:
                found.append(Finding(kind, name, f"{value:g} {unit}, most clips have {usual:g}"))
    return found


def _clips(index: RefAvsIndex, found: list[Finding]) -> list[Clip]:
    """Every clip that a row of any split names; one with links that lead out of the data set is a finding instead."""
    members: dict[str, list[Row]] = defaultdict(list)
    for split in Split:
        for row in index.rows(split):
            members[row.clip].append(row)
    clips = []
    for name, rows in members.items():
        folders: dict[Path, list[Row]] = defaultdict(list)
        try:
            for row in rows:
                folders[index.mask_folder(row)].append(row)
            objects = [(f, all(row.is_null for row in same), _numbers(same)) for f, same in folders.items()]
            clips.append(Clip(name, index.frames_folder(name), index.audio_path(name), objects, _numbers(rows)))
        except DataError as error:
            found.append(Finding("outside", name, str(error), _numbers(rows)))
    return clips


def _read(clips: Sequence[Clip], options: argparse.Namespace) -> Iterator[Clip]:
    check = partial(check_clip, max_pixels=options.max_image_pixels, max_seconds=options.max_audio_seconds)
    if not options.workers:
        yield from map(check, clips)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([check_clip.__module__])  # the decoders are imported once for all
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        yield from pool.map(check, clips, chunksize=4)


def check_clip(clip: Clip, max_pixels: int | None, max_seconds: float | None) -> Clip:
    """Everything about one clip; faults become findings. Larger files than the limits are not decoded."""
    size = _check_frames(clip, max_pixels)
    for folder, null, rows in clip.objects:
        if not null or folder.is_dir():
            _check_masks(clip, folder, null, rows, size, max_pixels)
    _check_sound(clip, max_seconds)
    return clip


def _check_frames(clip: Clip, max_pixels: int | None) -> tuple[int, int] | None:
    """(height, width) of the first frame that can be read."""
    count, frames = _images(clip, clip.frames_folder, cv2.IMREAD_COLOR, max_pixels, clip.rows)
    clip.frames = count
    if not frames:
        return None
    first = next(iter(frames.values()))
    for path, image in frames.items():
        if image.shape != first.shape:
            clip.add("wrong size", path, f"{_size(image)} pixels, the clip's first frame has {_size(first)}")
    if count > 1 and all(np.array_equal(image, first) for image in frames.values()):
        clip.add("still frames", clip.frames_folder, f"{count} equal frames")
    return first.shape[:2]


def _check_masks(
    clip: Clip, folder: Path, null: bool, rows: tuple[int, ...], size: tuple[int, int] | None, max_pixels: int | None
) -> None:
    count, masks = _images(clip, folder, cv2.IMREAD_GRAYSCALE, max_pixels, rows)
    clip.masks += count
    for path, image in masks.items():
        if size is not None and image.shape != size:
            clip.add("wrong size", path, f"{_size(image)} pixels, the clip's frames have {size[1]}x{size[0]}", rows)
        odd = sorted(set(np.unique(image).tolist()) - {0, 255})
        if odd:
            clip.add("mask values", path, f"values {odd[:5]}", rows)
    if count and clip.frames and count != clip.frames:
        clip.add("missing", folder, f"{count} masks for {clip.frames} frames", rows)
    marked = any(image.any() for image in masks.values())
    if null and marked:
        clip.add("object of a null row", folder, "marks an object", rows)
    if count and not null and not marked and len(masks) == count:
        clip.add("empty mask", folder, f"all {count} masks are empty", rows)


def _check_sound(clip: Clip, max_seconds: float | None) -> None:
    path = clip.audio
    if not path.is_file():
        clip.add("missing", path, "no such file")
        return
    try:
        rate = soundfile.info(str(path)).samplerate
    except soundfile.SoundFileError:
        rate = SAMPLE_RATE  # read_audio says what is wrong
    try:
        wave = np.abs(read_audio(path, rate, max_seconds))
    except DataError as error:
        clip.add("broken", path, str(error))
        return
    clip.seconds = len(wave) / rate
    if wave.max() < SILENT_PEAK:
        clip.add("silent sound", path, f"peak {wave.max():.2g}")
    clipped = float((wave >= CLIPPED_LEVEL).mean())
    if clipped >= CLIPPED_SHARE:
        clip.add("clipped sound", path, f"{clipped:.1%} of the samples at full scale")


def _images(
    clip: Clip, folder: Path, mode: int, max_pixels: int | None, rows: tuple[int, ...]
) -> tuple[int, dict[Path, np.ndarray]]:
    """How many images a folder has, and those that can be read; the others are reported."""
    try:
        paths = list_images(folder)
    except DataError as error:
        clip.add("missing", folder, str(error), rows)
        return 0, {}
    images = {}
    for path in paths:
        try:
            images[path] = read_image(path, mode, max_pixels)
        except DataError as error:
            clip.add("broken", path, str(error), rows)
    return len(paths), images


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


if __name__ == "__main__":
    sys.exit(main())
