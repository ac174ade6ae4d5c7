"""Files of an evaluation: each rank appends finished rows to its own part file, rank 0 merges them at the end.

    <folder>/parts-<identity>/rank<k>.jsonl   one line per row, fsynced; a truncated last line is dropped when read
    <folder>/predictions.jsonl, metrics.json  written under a temporary name and renamed

`identity` is a hash of all that a prediction depends on (weights, data, probe, code), so nothing stale is ever reused.
"""

from __future__ import annotations

import hashlib
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


def identity_of(facts: dict[str, Any]) -> str:
    """Twelve hex digits that name everything a prediction depends on (plain JSON values)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents of files, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def describe_files(paths: Iterable[Path], hash_below: int = 1 << 26) -> dict[str, str]:
    """File name -> hash of its content, or its size where it has `hash_below` bytes or more (weights of a 7B model)."""
    sizes = {path: path.stat().st_size for path in sorted(paths)}
    return {p.name: hash_files([p])[:16] if size < hash_below else f"{size} bytes" for p, size in sizes.items()}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (temporary name in the same folder, fsync, rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; refuses NaN and infinity (ValueError)."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """`write_bytes` of one JSON object per line."""
    write_bytes(path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records).encode())


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
