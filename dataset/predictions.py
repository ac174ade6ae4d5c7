"""A folder of predicted masks, made by any method, as mask logits of the benchmark's rows.

One folder per row, found under one of these names (`LAYOUTS`; the one under which most rows are found counts for all):

    <pred>/00012/00000.png ...             row number in the table, as train_ds_test.py writes (eval.save_masks)
    <pred>/<uid>/00000.png ...             11 uids of Ref-AVS stand in two rows: these share a folder
    <pred>/<clip>/fid_<fid>/00000.png ...  as the ground truth: all expressions about one object share a folder

Images are numbered from 0 (0.png or 00000.png), one per frame, 8 or 16 bit grey. An image that holds only 0 and the
largest value (255 or 65535) is a mask; any other is a probability, value / largest value. A row of 8-bit images with
one value besides 0 may be either (a mask of label 1, a palette's colour): it is refused until `kind` says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.media import list_images, read_image
from dataset.refavs import Row
from utils.errors import DataError
from utils.scoring import EMPTY_LOGIT

Kind = Literal["auto", "masks", "probabilities"]
LAYOUTS = {
    "row": lambda row: f"{row.row:05d}",
    "uid": lambda row: row.uid,
    "object": lambda row: f"{row.clip}/fid_{row.fid}",
}
"""Name of a layout -> folder of a row, below the folder of predictions."""


class PredictionFolder:
    """Where each row's prediction lies.

    Args:
        root: folder of predictions.
        rows: all rows that are to be scored.

    Raises:
        DataError: no such folder, or no row is found in it under any layout.
    """

    def __init__(self, root: str | Path, rows: Sequence[Row]) -> None:
        self.root, self.rows = Path(root), list(rows)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder. Remedy: name the folder of the predictions.")
        found = {name: sum((self.root / place(row)).is_dir() for row in rows) for name, place in LAYOUTS.items()}
        self.layout = max(found, key=lambda name: found[name])
        if not rows or not found[self.layout]:
            tried = ", ".join(place(rows[0]) for place in LAYOUTS.values()) if rows else "nothing: no row was asked for"
            raise DataError(
                f"{self.root}: holds no row of this split (looked for {tried}). "
                "Remedy: see `python scripts/evaluate_masks.py --help` for the names, and check --split."
            )

    def folder(self, row: Row) -> Path:
        """The row's folder, whether it exists or not."""
        return self.root / LAYOUTS[self.layout](row)

    @property
    def missing(self) -> list[Row]:
        """Rows without a folder."""
        return [row for row in self.rows if not self.folder(row).is_dir()]

    @property
    def others(self) -> int:
        """Folders beside those of the rows; they are not read."""
        known = {LAYOUTS[self.layout](row).split("/")[0] for row in self.rows}
        return sum(path.is_dir() and path.name not in known for path in self.root.iterdir())

    @property
    def shared(self) -> int:
        """Rows whose folder is also another row's."""
        uses = Counter(self.folder(row) for row in self.rows)
        return sum(count for count in uses.values() if count > 1)


def read_prediction(
    folder: Path,
    frames: int,
    sizes: Sequence[tuple[int, int]],
    kind: Kind = "auto",
    max_pixels: int | None = None,
) -> Tensor:
    """Mask logits of one row, float32 [T,H,W].

    A mask's pixels become +-1e4, so that nothing but their side of every threshold counts; probabilities 0 and 1 are
    taken as half a grey step off, and the logit of every other value is exact to float32.

    Args:
        folder: of the row.
        frames: T, of the clip.
        sizes: (height, width) that are allowed.
        kind: "auto" tells masks from probabilities row by row, see above.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        DataError: frames missing or too many, another size, unequal depths, values that are no mask; names the file.
    """
    paths = list_images(folder)
    if len(paths) != frames:
        raise DataError(
            f"{folder}: {len(paths)} images for a clip of {frames} frames. Remedy: write one image for each frame."
        )
    images = [read_image(path, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH, max_pixels) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape not in sizes or image.shape != images[0].shape:
            allowed = " or ".join(f"{width}x{height}" for height, width in sizes)
            raise DataError(
                f"{path}: {image.shape[1]}x{image.shape[0]} pixels; the protocol takes {allowed}, one size per clip. "
                "Remedy: resize the logits before they are written, never the finished mask."
            )
        if image.dtype != images[0].dtype:
            raise DataError(f"{path}: {image.dtype}, {paths[0].name} is {images[0].dtype}. Remedy: write one depth.")
    return _logits(folder, np.stack(images), kind)


def _logits(folder: Path, values: np.ndarray, kind: Kind) -> Tensor:
    top = int(np.iinfo(values.dtype).max)
    largest = int(values.max())
    binary = largest in (0, top) and not ((values > 0) & (values < top)).any()
    odd = sorted(set(np.unique(values).tolist()) - {0, top})
    marked = len(odd) == 1 and largest != top and (top == 255 or largest == 255)  # a label or palette colour, 8 bits
    if kind == "masks" and not binary or kind == "auto" and marked:
        raise DataError(
            f"{folder}: values {odd[:5]}; a mask holds 0 and {top} only. "
            f"Remedy: write the object as {top}, or say --kind probabilities."
        )
    if binary and kind != "probabilities":
        return torch.from_numpy(np.where(values > 0, np.float32(-EMPTY_LOGIT), np.float32(EMPTY_LOGIT)))
    share = np.clip(values.astype(np.float64) / top, 0.5 / top, 1 - 0.5 / top)
    return torch.from_numpy(np.log(share / (1 - share)).astype(np.float32))
