"""The media of one clip looked at whole: frames, masks of all its objects, sound. Run in parallel by `check_media`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import soundfile

from dataset.doctor import Finding, unlike_most
from dataset.media import SAMPLE_RATE, list_images, read_audio, read_image
from dataset.refavs import RefAvsIndex, Split
from utils.errors import DataError

SILENT_PEAK = 1e-3
"""A sound that never rises above it (-60 dB of full scale) is called silent."""
CLIPPED_LEVEL = 0.999
CLIPPED_SHARE = 0.01
"""A sound is called clipped when this share of its samples stands at CLIPPED_LEVEL or above."""
LENGTH_TOLERANCE = 0.25
"""Seconds by which a sound may differ from the usual length."""


@dataclass(frozen=True)
class Limits:
    """Larger files are refused before they are decoded (data.max_image_pixels, data.max_audio_seconds)."""

    pixels: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ClipFiles:
    """What belongs to one clip."""

    clip: str
    frames: Path
    audio: Path
    objects: tuple[tuple[Path, bool, tuple[int, ...]], ...]
    """(mask folder, whether only null rows name it, metadata rows)."""
    rows: tuple[int, ...]


@dataclass
class ClipReport:
    """What was found in one clip."""

    clip: str
    findings: list[Finding] = field(default_factory=list)
    frames: int = 0
    masks: int = 0
    seconds: float | None = None
    """Length of the sound; None where it cannot be read."""

    def add(self, kind: str, where: Path | str, text: str, rows: tuple[int, ...]) -> None:
        self.findings.append(Finding(kind, str(where), text, rows))


def clip_files(index: RefAvsIndex) -> tuple[list[ClipFiles], list[Finding]]:
    """Files of every clip that a row of any split names, and the links that lead out of the data set."""
    members: dict[str, list] = defaultdict(list)
    for split in Split:
        for row in index.rows(split):
            members[row.clip].append(row)
    clips, found = [], []
    for clip, rows in members.items():
        numbers = tuple(row.row for row in rows)
        folders: dict[Path, list] = defaultdict(list)
        try:
            for row in rows:
                folders[index.mask_folder(row)].append(row)
            objects = tuple((f, all(r.is_null for r in rs), tuple(r.row for r in rs)) for f, rs in folders.items())
            clips.append(ClipFiles(clip, index.frames_folder(clip), index.audio_path(clip), objects, numbers))
        except DataError as error:
            found.append(Finding("outside", clip, str(error), numbers))
    return clips, found


def check_media(
    index: RefAvsIndex, limits: Limits, workers: int, progress: Callable[[Iterable, int], Iterable]
) -> tuple[list[Finding], dict[str, int]]:
    """Read every frame, mask and sound once.

    Args:
        index: of the table.
        limits: larger files are reported, not decoded.
        workers: reading processes; 0 = this one.
        progress: wraps an iterable and its length (tqdm).

    Returns:
        Findings in order of the table, and how much was read.

    Raises:
        DataError: a reading process was killed.
    """
    clips, found = clip_files(index)
    checked = {"clips": 0, "frames": 0, "masks": 0, "sounds": 0}
    lengths, counts = {}, {}
    try:
        for report in progress(_reports(clips, limits, workers), len(clips)):
            found += report.findings
            checked["clips"] += 1
            checked["frames"] += report.frames
            checked["masks"] += report.masks
            if report.frames:
                counts[report.clip] = float(report.frames)
            if report.seconds is not None:
                checked["sounds"] += 1
                lengths[report.clip] = round(report.seconds, 1)
    except BrokenProcessPool as error:
        raise DataError(
            f"{index.root}: a reading process was killed, most likely for memory. Remedy: fewer --workers, or lower "
            "--max-image-pixels and --max-audio-seconds."
        ) from error
    found += unlike_most(counts, "frame count", "frames")
    found += unlike_most(lengths, "sound length", "s", LENGTH_TOLERANCE)
    return found, checked


def _reports(clips: list[ClipFiles], limits: Limits, workers: int) -> Iterator[ClipReport]:
    if not workers:
        yield from (check_clip(clip, limits) for clip in clips)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(["dataset.doctor_media"])  # the decoders are imported once for all
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(check_clip, clips, [limits] * len(clips), chunksize=4)


def check_clip(files: ClipFiles, limits: Limits) -> ClipReport:
    """Everything about one clip; faults become findings."""
    report = ClipReport(files.clip)
    size = _check_frames(files, limits, report)
    for folder, null, rows in files.objects:
        _check_masks(folder, null, rows, size, limits, report)
    _check_sound(files, limits, report)
    return report


def _check_frames(files: ClipFiles, limits: Limits, report: ClipReport) -> tuple[int, int] | None:
    """(height, width) of the first frame that can be read."""
    size, first, still = None, None, True
    for path, image in _images(files.frames, cv2.IMREAD_COLOR, limits, files.rows, report):
        report.frames += 1
        if image is None:
            continue
        if first is None:
            size, first = image.shape[:2], image
        elif image.shape != first.shape:
            text = f"{image.shape[1]}x{image.shape[0]} pixels, the clip's first frame has {size[1]}x{size[0]}"
            report.add("wrong size", path, text, files.rows)
        still = still and np.array_equal(image, first)
    if still and report.frames > 1 and first is not None:
        report.add("still frames", files.frames, f"{report.frames} equal frames", files.rows)
    return size


def _check_masks(
    folder: Path, null: bool, rows: tuple[int, ...], size: tuple[int, int] | None, limits: Limits, report: ClipReport
) -> None:
    if null and not folder.is_dir():
        return
    count, marked, unread = 0, False, False
    for path, image in _images(folder, cv2.IMREAD_GRAYSCALE, limits, rows, report):
        count += 1
        if image is None:
            unread = True
            continue
        marked = marked or bool(image.any())
        if size is not None and image.shape != size:
            text = f"{image.shape[1]}x{image.shape[0]} pixels, the clip's frames have {size[1]}x{size[0]}"
            report.add("wrong size", path, text, rows)
        odd = sorted(set(np.unique(image).tolist()) - {0, 255})
        if odd:
            report.add("mask values", path, f"values {odd[:5]}", rows)
    report.masks += count
    if count and report.frames and count != report.frames:
        report.add("missing", folder, f"{count} masks for {report.frames} frames", rows)
    if null and marked:
        report.add("object of a null row", folder, "marks an object", rows)
    if count and not null and not marked and not unread:
        report.add("empty mask", folder, f"all {count} masks are empty", rows)


def _check_sound(files: ClipFiles, limits: Limits, report: ClipReport) -> None:
    path = files.audio
    if not path.is_file():
        report.add("missing", path, "no such file", files.rows)
        return
    try:
        rate = soundfile.info(str(path)).samplerate
    except soundfile.SoundFileError:
        rate = SAMPLE_RATE  # read_audio says what is wrong
    try:
        wave = np.abs(read_audio(path, rate, limits.seconds))
    except DataError as error:
        report.add("broken", path, str(error), files.rows)
        return
    report.seconds = len(wave) / rate
    if wave.max() < SILENT_PEAK:
        report.add("silent sound", path, f"peak {wave.max():.2g}", files.rows)
    clipped = float((wave >= CLIPPED_LEVEL).mean())
    if clipped >= CLIPPED_SHARE:
        report.add("clipped sound", path, f"{clipped:.1%} of the samples at full scale", files.rows)


def _images(
    folder: Path, mode: int, limits: Limits, rows: tuple[int, ...], report: ClipReport
) -> Iterator[tuple[Path, np.ndarray | None]]:
    """Each image of a folder, None for one that cannot be read (which is reported)."""
    try:
        paths = list_images(folder)
    except DataError as error:
        report.add("missing", folder, str(error), rows)
        return
    for path in paths:
        try:
            yield path, read_image(path, mode, limits.pixels)
        except DataError as error:
            report.add("broken", path, str(error), rows)
            yield path, None
