"""The pictures and sounds of a gallery, as files beside the page, so that a browser loads only what is looked at.

    <page>_files/frames/<clip>.jpg          all frames of a clip as one picture, COLUMNS to a row
    <page>_files/truth/<row>.png            the true masks as a transparent picture of the same layout
    <page>_files/masks/<evaluation>/<row>.png   the predicted ones
    <page>_files/sound/<clip>.mp3

Those of AVSBench lie in a folder of their own there, as its rows have the numbers of others.
Frames are stored once per clip, masks are a few kilobytes of palette; the browser lays one over the other.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import quote

import cv2
import numpy as np
import soundfile
from PIL import Image

from utils.draw import PREDICTION, TRUTH, Colour, jpeg
from utils.report_runs import Evaluation, PredictedRow
from utils.results import decode_masks

COLUMNS = 5
"""Frames side by side in a picture."""
WIDTH = 256
"""Frames are shrunk to this many pixels."""
PARTS = ("frames", "truth", "masks", "sound", "avsbench_s4", "avsbench_ms3")
_FILL, _DIM = 70, 120
"""Opacity (0..255) of a mask's inside, and of the black that dims what is outside it."""


@runtime_checkable
class MediaSource(Protocol):
    """Where the frames, the true masks and the sounds of rows come from (see `dataset.gallery`)."""

    def frames(self, clip: str) -> np.ndarray:
        """uint8 [T,H,W,3] RGB."""

    def truth(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """bool [T,H,W] of a row, whose clip has frames of `size` (height, width)."""

    def sound(self, clip: str) -> Path | None:
        """The sound file of a clip, if there is one."""


@dataclass(frozen=True)
class RowMedia:
    """Addresses, relative to the page, of what a row shows."""

    frames: str
    truth: str
    masks: Mapping[str, str]
    """Evaluation -> predicted masks."""
    size: tuple[int, int]
    """(height, width) of a frame."""
    count: int
    """Frames."""
    share: float
    """Mean share of the frame that the true object covers, in [0, 1]."""


@dataclass(frozen=True)
class Drawn:
    """All that was written for a gallery."""

    rows: Mapping[int, RowMedia]
    sounds: Mapping[str, str]
    """Clip -> address."""


def files_folder(page: Path) -> Path:
    """The folder beside a page that holds its files."""
    return page.with_name(f"{page.stem}_files")


def empty_files(page: Path) -> None:
    """Remove what an earlier report left beside a page."""
    for name in PARTS:
        if (files_folder(page) / name).exists():
            shutil.rmtree(files_folder(page) / name)


class _Beside:
    """Writes files beside a page, those of AVSBench apart."""

    def __init__(self, page: Path, evaluations: Sequence[Evaluation]) -> None:
        benchmark = evaluations[0].benchmark
        self.parent, self.part = page.parent, files_folder(page).name
        if benchmark != "refavs":
            self.part += f"/{benchmark}"

    def write(self, name: str, data: bytes) -> str:
        """Write a file, without waiting for the disk; returns its address relative to the page."""
        path = self.parent / self.part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return quote(f"{self.part}/{name}")


def draw_media(
    page: Path, source: MediaSource, evaluations: Sequence[Evaluation], rows: Iterable[int], width: int = WIDTH
) -> Drawn:
    """Write the files of some rows beside a page.

    Args:
        page: path of the HTML file.
        source: of frames, truth and sounds.
        evaluations: whose masks are drawn, all of one benchmark.
        rows: numbers.
        width: frames are shrunk to this many pixels.

    Raises:
        DataError: a file of the data is missing or broken.
        ValueError: predicted masks do not have the size of their frames.
    """
    folder = _Beside(page, evaluations)
    groups: dict[str, list[int]] = {}
    heard: dict[str, None] = {}
    for number in rows:
        for row in (e.rows[number] for e in evaluations if number in e.rows):
            heard[row.audio] = None
        groups.setdefault(row.clip, []).append(number)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # opencv and libsndfile work outside the interpreter's lock
        drawn = pool.map(lambda item: _draw_clip(folder, source, evaluations, *item, width), groups.items())
        media = {number: found for clip in drawn for number, found in clip.items()}
        return Drawn(media, _write_sounds(folder, source.sound, heard, pool))


def draw_sounds(
    page: Path, find: Callable[[str], Path | None], evaluations: Sequence[Evaluation], rows: Iterable[int]
) -> Drawn:
    """Write the sounds alone, where a page shows pictures that the evaluation drew.

    Args:
        page: path of the HTML file.
        find: clip -> its sound file, if there is one.
        evaluations: that show these rows, all of one benchmark.
        rows: numbers.
    """
    folder = _Beside(page, evaluations)
    clips = [e.rows[n].audio for e in evaluations for n in rows if n in e.rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Drawn({}, _write_sounds(folder, find, dict.fromkeys(clips), pool))


def sprite(frames: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """uint8 [T,H,W,C] -> one picture uint8, COLUMNS frames to a row, each at most `width` wide; free places black."""
    height, native = frames.shape[1:3]
    if native > width:
        size = (width, max(1, round(height * width / native)))
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    missing = -len(frames) % COLUMNS if len(frames) > COLUMNS else 0
    frames = np.concatenate([frames, np.zeros_like(frames[:1]).repeat(missing, 0)])
    columns = min(COLUMNS, len(frames))
    grid = frames.reshape(-1, columns, *frames.shape[1:])
    return grid.transpose(0, 2, 1, 3, *range(4, grid.ndim)).reshape(-1, columns * frames.shape[2], *frames.shape[3:])


def mask_layer(masks: np.ndarray, colour: Colour, width: int = WIDTH) -> bytes:
    """bool [T,H,W] -> a transparent PNG in the layout of `sprite`: outside dimmed, inside tinted, outline opaque."""
    scale = min(1.0, width / masks.shape[2])
    size = (round(masks.shape[2] * scale), max(1, round(masks.shape[1] * scale)))
    levels = []
    for mask in masks.astype(np.uint8):
        small = mask if scale == 1 else cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
        outlines, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        levels.append(cv2.drawContours(small.copy(), outlines, -1, 2, max(1, round(size[0] / 200))))
    image = Image.fromarray(sprite(np.stack(levels)[..., None], width)[..., 0], mode="P")
    image.putpalette([0, 0, 0, *colour, *colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=bytes([_DIM, _FILL, 255]), bits=2, optimize=True)
    return buffer.getvalue()


def mp3(path: Path) -> bytes:
    """A sound file as small mono MP3."""
    wave, rate = soundfile.read(path, always_2d=True)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.mean(1), rate, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9)
    return buffer.getvalue()


def _draw_clip(
    folder: _Beside, source: MediaSource, evaluations: Sequence[Evaluation], clip: str, rows: Sequence[int], width: int
) -> dict[int, RowMedia]:
    frames = source.frames(clip)
    count, size = len(frames), tuple(frames.shape[1:3])
    picture = folder.write(f"frames/{clip}.jpg", jpeg(sprite(frames, width), 82))
    media = {}
    for number in rows:
        truth = source.truth(number, size)
        predicted = {e.name: e.rows[number] for e in evaluations if number in e.rows}
        media[number] = RowMedia(
            frames=picture,
            truth=folder.write(f"truth/{number:05d}.png", mask_layer(truth, TRUTH, width)),
            masks={name: _write_masks(folder, name, row, truth.shape, width) for name, row in predicted.items()},
            size=size,
            count=count,
            share=float(truth.mean()),
        )
    return media


def _write_masks(folder: _Beside, name: str, row: PredictedRow, shape: tuple[int, ...], width: int) -> str:
    masks = decode_masks(row.masks)
    if masks.shape != shape:
        raise ValueError(f"{name}, row {row.row}: predicted masks are {masks.shape}, the data's {shape}")
    return folder.write(f"masks/{name.replace('/', '_')}/{row.row:05d}.png", mask_layer(masks, PREDICTION, width))


def _write_sounds(
    folder: _Beside, find: Callable[[str], Path | None], clips: Iterable[str], pool: ThreadPoolExecutor
) -> dict[str, str]:
    found = {clip: path for clip in clips if (path := find(clip)) is not None}
    addresses = pool.map(lambda item: folder.write(f"sound/{item[0]}.mp3", mp3(item[1])), found.items())
    return dict(zip(found, addresses, strict=True))
