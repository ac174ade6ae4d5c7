"""Where the media of a benchmark lie, and the true masks of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.media import ImageFolder, frame_indexes, list_images, read_masks
from dataset.refavs import Row
from utils.errors import DataError


class ClipIndex(Protocol):
    """Where the media of a benchmark lie (`dataset.refavs.RefAvsIndex`, `dataset.avsbench.AvsBenchIndex`)."""

    table: Path
    """The file that lists the rows."""

    def rows(self, split: str) -> list[Row]: ...

    def clips(self, split: str) -> list[str]: ...

    def frames_folder(self, clip: str) -> Path | ImageFolder: ...

    def audio_path(self, clip: str) -> Path: ...

    def mask_folder(self, row: Row) -> Path | ImageFolder: ...


def read_truth(
    index: ClipIndex,
    row: Row,
    size: tuple[int, int],
    num_frames: int | None = None,
    max_pixels: int | None = None,
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Ground truth of a row, bool [T,H,W], and which of the T frames have one (None = all; the others are False).

    A null row's mask is empty by definition: its folder may be absent; one that is there is not read. Where it marks
    an object, scripts/check_data.py counts it ("object of a null row", a warning), and the run goes on.

    Args:
        index: says where media lie.
        row: the row.
        size: (height, width) of the clip's frames.
        num_frames: frames read of the clip, evenly spaced; None = all.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        DataError: see `media.read_masks`.
    """
    total = len(list_images(index.frames_folder(row.clip)))
    indexes = list(range(total)) if num_frames is None else frame_indexes(total, num_frames)
    masks = np.zeros((len(indexes), *size), dtype=bool)
    folder = index.mask_folder(row)
    if isinstance(folder, ImageFolder) and folder.partly:
        count = min(len(list_images(folder)), total)
        labelled = tuple(k for k, i in enumerate(indexes) if i < count)
        if not labelled:
            raise DataError(f"{folder}: none of the frames read has a mask. Remedy: set data.num_frames to null.")
        masks[list(labelled)] = read_masks(folder, count, size, [indexes[k] for k in labelled], max_pixels)
        return masks, None if len(labelled) == len(indexes) else labelled
    if row.is_null:
        return masks, None
    return read_masks(folder, total, size, indexes, max_pixels), None
