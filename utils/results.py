"""Files of an evaluation: each rank appends finished rows to its own part file, rank 0 merges them at the end.

    <folder>/parts-<identity>/rank<k>.jsonl   one line per row, fsynced; a truncated last line is dropped when read
    <folder>/predictions.jsonl, metrics.json  written whole (utils.files)

`identity` is a hash of all that a prediction depends on (weights, data, probe, code), so nothing stale is ever reused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pycocotools import mask as coco

from utils.errors import DataError

MAX_MASK_PIXELS = 50_000_000
"""Of one run-length mask; as many as `data.max_image_pixels` allows a frame by default."""


class PartWriter:
    """Appends rows to one rank's part file; a batch is on disk when `append` returns."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{rank}.jsonl"
        self._file = open(path, "ab")
        complete = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(complete)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """One line per record, then fsync."""
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_parts(folder: Path) -> dict[int, dict[str, Any]]:
    """Rows of all part files, by row number. Rows that stand twice (a batch that was repeated) are equal; one is kept.

    Raises:
        DataError: for a line other than a file's last that is no JSON object with a row number.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                row = record["row"]
                found[row] = record
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: no JSON object with a row ({error!r}). Remedy: delete the file and run again."
                ) from error
    return found


def drop_other_parts(folder: Path, identity: str) -> None:
    """Remove the parts of runs with other weights, data or settings."""
    for path in folder.glob("parts-*"):
        if path.name != f"parts-{identity}":
            shutil.rmtree(path)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """bool [T,H,W] -> one COCO RLE per frame ({"size": [H, W], "counts": text})."""
    encoded = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(map(int, rle["size"])), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def decode_masks(rles: Iterable[dict[str, Any]]) -> np.ndarray:
    """Inverse of `encode_masks`: bool [T,H,W].

    Raises:
        DataError: no such list of run lengths. (pycocotools believes what it is told and ends the process.)
    """
    checked = list(rles)
    for number, rle in enumerate(checked):
        fault = _rle_fault(rle)
        if fault is None and rle["size"] != checked[0]["size"]:
            fault = f"size {rle['size']}, the first has {checked[0]['size']}"
        if fault is not None:
            raise DataError(f"run-length mask {number}: {fault}. Remedy: run the evaluation again.")
    if not checked:
        raise DataError("no run-length mask. Remedy: run the evaluation again.")
    return coco.decode(checked).transpose(2, 0, 1).astype(bool)


def _rle_fault(rle: Any) -> str | None:
    """What is wrong with a COCO run-length mask, or None."""
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str) or not isinstance(rle.get("size"), list):
        return f"{str(rle)[:80]!r} is no {{size: [H, W], counts: text}}"
    size, counts = rle["size"], rle["counts"]
    sides = len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not sides or size[0] * size[1] > MAX_MASK_PIXELS:
        return f"size {size} is not [H, W] of at most {MAX_MASK_PIXELS} pixels"
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts.encode("utf-8", "replace"):
        bits = character - 48  # six bits a character: five of the number, one for "more follows"
        if not 0 <= bits < 64 or shift > 30:
            return f"counts {counts[:40]!r} are not COCO's characters"
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            # from the fourth on a run is written as the difference to the one before last
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift or any(run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        return f"its runs hold {sum(runs)} pixels, size {size} has {size[0] * size[1]}"
    return None
