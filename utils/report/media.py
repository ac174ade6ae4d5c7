"""The clips of a report: their pictures and sounds as files beside the page, and what the page says of each row.

    <page>_files/frames/<clip>.jpg          all frames of a clip as one picture, COLUMNS to a row
    <page>_files/truth/<row>.png            the true masks as a transparent picture of the same layout
    <page>_files/masks/<evaluation>/<row>.png   the predicted ones
    <page>_files/sound/<clip>.mp3

Those of AVSBench lie in a folder of their own there, as its rows have the numbers of others. Frames are stored once
per clip, masks are a few kilobytes of palette; the browser lays one over the other and loads only what is looked at.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import cv2
import numpy as np
import soundfile
from PIL import Image

from utils.answers import reasoning_steps
from utils.draw import PREDICTION, TRUTH, Colour, jpeg, shrink
from utils.evaluation import spread
from utils.report.breakdown import size_names
from utils.report.runs import Evaluation, PredictedRow
from utils.results import decode_masks

COLUMNS = 5
"""Frames side by side in a picture."""
WIDTH = 256
"""Frames are shrunk to this many pixels."""
FIELDS = {"split": "split", "kind": "kind", "class": "cls", "mask_size": "size", "failure": "failure"}
"""Drop-down list of the gallery -> field of a clip."""
PARTS = ("frames", "truth", "masks", "sound", "avsbench_s4", "avsbench_ms3")
_FILL, _DIM = 70, 120
"""Opacity (0..255) of a mask's inside, and of the black that dims what is outside it."""


class MediaSource(Protocol):
    """Where the frames, the true masks and the sounds of rows come from (`dataset.gallery`)."""

    def frames(self, clip: str) -> np.ndarray:
        """uint8 [T,H,W,3] RGB."""

    def truth(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """bool [T,H,W] of a row, whose clip has frames of `size` (height, width)."""

    def sound(self, clip: str) -> Path | None:
        """The sound file of a clip, if there is one."""


def empty_files(page: Path) -> None:
    """Remove what an earlier report left beside a page."""
    for name in PARTS:
        shutil.rmtree(page.with_name(f"{page.stem}_files") / name, ignore_errors=True)


def write_clips(
    page: Path,
    source: MediaSource | None,
    evaluations: Sequence[Evaluation],
    limit: int | None = None,
    width: int = WIDTH,
    failures: Mapping[int, str] | None = None,
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Write the pictures and sounds of rows beside a page.

    Args:
        page: path of the HTML file.
        source: of frames, truth and sounds; None shows only the rows of which the evaluation drew a picture
            (eval.pictures), without sound.
        evaluations: that show these rows, all of one benchmark, in the order of the page.
        limit: at most this many rows, evenly spread over splits and kinds; None = all.
        width: frames are shrunk to this many pixels.
        failures: row -> type of failure.

    Returns:
        One clip of the gallery per row, as plain values, and row -> name of its mask size (only with a source).

    Raises:
        DataError: a file of the data is missing or broken.
        ValueError: predicted masks do not have the size of their frames.
    """
    rows = {n: row for e in evaluations for n, row in e.rows.items()}
    media: dict[int, dict[str, Any]] = {}
    drawn = [] if source else [(e, n) for e in evaluations for n in e.rows]
    for e, n in drawn:
        path = e.folder / e.rows[n].split / "pictures" / f"{n:05d}.jpg"
        if path.is_file():
            address = quote(os.path.relpath(path, page.parent))
            media.setdefault(n, {"pictures": {}})["pictures"][e.name] = {"strip": address}
    numbers = sorted(rows if source else media)
    if limit is not None:
        numbers = sorted(spread(numbers, [f"{rows[n].split} {rows[n].kind}" for n in numbers], limit))
    sounds: dict[str, str] = {}
    sizes: dict[int, str] = {}
    if source:
        media, sounds, sizes = _draw(page, source, evaluations, numbers, width)
    return gallery_rows(evaluations, numbers, media, sounds, sizes, failures), sizes


def _draw(
    page: Path, source: MediaSource, evaluations: Sequence[Evaluation], numbers: Sequence[int], width: int
) -> tuple[dict[int, dict[str, Any]], dict[str, str], dict[int, str]]:
    """Write the files of rows; returns `media`, `sounds` and `sizes` of `gallery_rows`."""
    benchmark = evaluations[0].benchmark
    part = f"{page.stem}_files" + ("" if benchmark == "refavs" else f"/{benchmark}")

    def write(name: str, data: bytes) -> str:
        """Without waiting for the disk; returns the address relative to the page."""
        path = page.parent / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return quote(f"{part}/{name}")

    def draw(clip: str) -> list[tuple[int, dict[str, Any]]]:
        frames = source.frames(clip)
        picture = write(f"frames/{clip}.jpg", jpeg(sprite(frames, width), 82))
        found = []
        for n in clips[clip]:
            truth = source.truth(n, frames.shape[1:3])
            layers = {}
            for e in (e for e in evaluations if n in e.rows):
                masks = decode_masks(e.rows[n].masks)
                if masks.shape != truth.shape:
                    raise ValueError(f"{e.name}, row {n}: predicted masks are {masks.shape}, the data's {truth.shape}")
                name = f"masks/{e.name.replace('/', '_')}/{n:05d}.png"
                layers[e.name] = {"masks": write(name, mask_layer(masks, PREDICTION, width))}
            layer = write(f"truth/{n:05d}.png", mask_layer(truth, TRUTH, width))
            shares[n] = float(truth.mean())
            found.append((n, {"frames": picture, "truth": layer, "n": len(frames), "hw": list(frames.shape[1:3]),
                              "pictures": layers}))  # fmt: skip
        return found

    clips: dict[str, list[int]] = {}
    shares: dict[int, float] = {}
    shown = {n: [e.rows[n] for e in evaluations if n in e.rows] for n in numbers}
    for n, rows in shown.items():
        clips.setdefault(rows[0].clip, []).append(n)
    heard = dict.fromkeys(row.audio for rows in shown.values() for row in rows)
    files = {clip: path for clip in heard if (path := source.sound(clip)) is not None}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # opencv and libsndfile work outside the interpreter's lock
        media = {n: row for found in pool.map(draw, clips) for n, row in found}
        written = pool.map(lambda clip: write(f"sound/{clip}.mp3", mp3(files[clip])), files)
        sounds = dict(zip(files, written, strict=True))
    return media, sounds, size_names({n: shares[n] for n in media if shares[n] > 0})


def gallery_data(evaluations: Sequence[Evaluation], clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What gallery.js needs to know, as plain values.

    Args:
        evaluations: in the order of the page.
        clips: `gallery_rows` of each benchmark; the texts of their steps become numbers of `texts`, where each stands
            once: models repeat themselves, and a page of thousands of clips must stay small.
    """
    plain = [e for e in evaluations if e.probe == "none"] or list(evaluations)
    same = [e.name for e in plain if e.benchmark == plain[0].benchmark]
    texts: dict[str, int] = {}
    rows = []
    for clip in clips:
        said = {
            name: {**answer, "steps": [[step, texts.setdefault(text, len(texts))] for step, text in answer["steps"]]}
            for name, answer in clip["said"].items()
        }
        rows.append({**clip, "said": said})
    names = {"runs": [e.name for e in evaluations], "run": same[-1] if same else ""}
    return {**names, "columns": COLUMNS, "fields": FIELDS, "texts": list(texts), "rows": rows}


def gallery_rows(
    evaluations: Sequence[Evaluation],
    rows: Sequence[int],
    media: Mapping[int, Mapping[str, Any]] | None = None,
    sounds: Mapping[str, str] | None = None,
    sizes: Mapping[int, str] | None = None,
    failures: Mapping[int, str] | None = None,
) -> list[dict[str, Any]]:
    """One clip of the gallery per row, as plain values.

    Args:
        evaluations: of one benchmark, in the order of the page.
        rows: that are shown.
        media: row -> `pictures` {evaluation: {"masks" or "strip", a picture ready made: address}}, and where the row
            was drawn `frames`, `truth`, `n` frames of `hw` (height, width).
        sounds: clip -> address.
        sizes: row -> name of its mask size.
        failures: row -> type of failure.
    """
    media, sounds, sizes, failures = media or {}, sounds or {}, sizes or {}, failures or {}
    listed = []
    for number in rows:
        said = {e.name: e.rows[number] for e in evaluations if number in e.rows}
        first = next(iter(said.values()))
        drawn = dict(media.get(number, {}))
        pictures = drawn.pop("pictures", {})
        listed.append({
            "row": number, "split": first.split, "kind": first.kind, "ref": first.reference, "cls": first.class_name,
            "clip": first.clip, "size": sizes.get(number, ""), "failure": failures.get(number, ""), **drawn,
            "said": {name: _said(row, pictures.get(name, {}), sounds) for name, row in said.items()},
        })  # fmt: skip
    return listed


def _said(row: PredictedRow, pictures: Mapping[str, str], sounds: Mapping[str, str]) -> dict[str, Any]:
    """What one evaluation answered to a row."""
    said: dict[str, Any] = {
        "steps": reasoning_steps(row.text, row.reference), "answer": row.answer_class, "right": row.class_right,
        "faithful": row.faithful, "seg": row.has_seg,
        "scores": {name: round(value, 1) for name, value in row.scores.items()},
        "jf": None if row.jf is None else round(row.jf, 2), **pictures,
    }  # fmt: skip
    if row.audio in sounds:
        said["sound"] = sounds[row.audio]
    other = [f"{what} {clip}" for what, clip in (("saw", row.video), ("heard", row.audio)) if clip != row.clip]
    if other:
        said["note"] = f"Probe: the model {' and '.join(other)}."
    return said


def sprite(frames: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """uint8 [T,H,W,C] -> one picture uint8, COLUMNS frames to a row, each at most `width` wide; free places black."""
    frames = np.stack([shrink(frame, width) for frame in frames])
    missing = -len(frames) % COLUMNS if len(frames) > COLUMNS else 0
    frames = np.concatenate([frames, np.zeros_like(frames[:1]).repeat(missing, 0)])
    columns = min(COLUMNS, len(frames))
    grid = frames.reshape(-1, columns, *frames.shape[1:])
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, columns * frames.shape[2], frames.shape[3])


def mask_layer(masks: np.ndarray, colour: Colour, width: int = WIDTH) -> bytes:
    """bool [T,H,W] -> a transparent PNG in the layout of `sprite`: outside dimmed, inside tinted, outline opaque."""
    levels = []
    for mask in masks.astype(np.uint8):
        small = np.ascontiguousarray(shrink(mask[..., None], width)[..., 0])
        outlines, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        levels.append(cv2.drawContours(small.copy(), outlines, -1, 2, max(1, round(small.shape[1] / 200))))
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
