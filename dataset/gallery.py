"""Frames, true masks and sounds of the evaluated data for the clips of a report (`utils.report.media`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset.avsbench import SPLITS, AvsBenchIndex
from dataset.media import ClipIndex, read_frames, read_truth
from dataset.refavs import RefAvsIndex, Row, Split
from utils.errors import DataError


class ClipMedia:
    """The media of one data set.

    Args:
        index: where its files lie.
        rows: number -> row.
        root: of the data, for messages.
        num_frames: frames that the evaluation took of a clip (data.num_frames); None = all.
    """

    def __init__(self, index: ClipIndex, rows: dict[int, Row], root: str | Path, num_frames: int | None = None) -> None:
        self.index, self.known, self.root, self.num_frames = index, rows, root, num_frames
        self.clips = {row.clip for row in rows.values()}

    def frames(self, clip: str) -> np.ndarray:
        """uint8 [T,H,W,3] RGB. Raises DataError for missing or broken files."""
        return read_frames(self.index.frames_folder(clip), self.num_frames)

    def truth(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """bool [T,H,W] of a row whose frames are of `size`; all False where nothing answers to the reference.

        Raises:
            DataError: no such row, or missing or broken files.
        """
        if row not in self.known:
            raise DataError(f"{self.root}: has no row {row}. Remedy: name the data that were evaluated (--data).")
        return read_truth(self.index, self.known[row], size, self.num_frames)[0]

    def sound(self, clip: str) -> Path | None:
        """The wav of a clip, None if there is none (a probe's silence has no clip)."""
        if clip not in self.clips:
            return None
        path = self.index.audio_path(clip)
        return path if path.is_file() else None


def media_of(benchmark: str, root: str | Path, num_frames: int | None = None) -> ClipMedia:
    """The media of `data.benchmark` below `root`; the mini world has the layout of Ref-AVS.

    Raises:
        DataError: its table is missing or faulty.
    """
    index: RefAvsIndex | AvsBenchIndex
    if benchmark == "refavs":
        index, splits = RefAvsIndex(root), tuple(Split)
    else:
        index, splits = AvsBenchIndex(root, "s4" if benchmark == "avsbench_s4" else "ms3"), SPLITS
    return ClipMedia(index, {row.row: row for split in splits for row in index.rows(split)}, root, num_frames)
