"""Frames, true masks and sounds of a Ref-AVS data set for the gallery of a report (`utils.report_media`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.media import frame_indexes, list_images, read_frames, read_masks
from dataset.refavs import RefAvsIndex
from utils.errors import DataError


class RefAvsMedia:
    """The media of one data set.

    Args:
        root: folder with metadata.csv, media/ and gt_mask/.
        num_frames: frames that the evaluation took of a clip (data.num_frames); None = all.

    Raises:
        DataError: the table is missing or faulty.
    """

    def __init__(self, root: str | Path, num_frames: int | None = None) -> None:
        self.index = RefAvsIndex(root)
        self.num_frames = num_frames

    def frames(self, clip: str) -> np.ndarray:
        """uint8 [T,H,W,3] RGB. Raises DataError for missing or broken files."""
        return read_frames(self.index.frames_folder(clip), self.num_frames)

    def truth(self, row: int, frames: int, size: tuple[int, int]) -> np.ndarray:
        """bool [T,H,W] of a metadata row; all False where nothing answers to the reference.

        Raises:
            DataError: no such row, or missing or broken files.
        """
        found = self.index.row(row)
        if found is None:
            raise DataError(f"{self.index.root}: has no row {row}. Remedy: name the data that were evaluated (--data).")
        if found.is_null:
            return np.zeros((frames, *size), bool)
        folder = self.index.mask_folder(found)
        if self.num_frames is None:
            return read_masks(folder, frames, size)
        total = len(list_images(self.index.frames_folder(found.clip)))
        return read_masks(folder, total, size, frame_indexes(total, self.num_frames))

    def sound(self, clip: str) -> Path | None:
        """The wav of a clip, None if there is none (a probe's silence has no clip)."""
        path = self.index.audio_path(clip)
        return path if path.is_file() else None
