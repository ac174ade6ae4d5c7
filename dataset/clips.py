"""`ClipDataset[i]`: metadata row -> decoded, preprocessed `Sample`.

`dataset[i]` is a pure function of the row, the settings and their seed: no random augmentation, nothing that depends on
the epoch or on what was read before (the released loader ignores `i`). Nothing is decoded at construction. Where rows
of a clip follow each other (evaluation, mining), `repeated` keeps the newest clip, so that it is decoded once.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.media import ClipIndex, read_audio, read_frames, read_truth
from dataset.processor import AuroraProcessor
from dataset.prompt import NEED_REASONING, AnswerKind, Prompts
from dataset.records import CotRecord
from dataset.refavs import Row
from utils.errors import DataError
from utils.types import Sample

Probe = Literal["none", "shuffle_audio", "zero_audio", "shuffle_video"]
PROBES: tuple[str, ...] = get_args(Probe)
T = TypeVar("T")


@dataclass(frozen=True)
class ClipSettings:
    """What is asked of every sample."""

    answer: AnswerKind | None = None
    """Target answer; None = none (evaluation)."""
    teacher_answer: AnswerKind | None = None
    """Answer that the distillation teacher reads (paper: "plain"; released code: "class"); None = no teacher."""
    num_frames: int | None = None
    """Frames per clip, evenly spaced; None = all on disk."""
    max_image_pixels: int | None = None
    """Larger frames or masks are refused before decoding."""
    max_audio_seconds: float | None = None
    """Longer sound files are refused before decoding."""
    keep_frames: bool = False
    """Keep the native frames in the sample, for pictures."""
    probe: Probe = "none"
    """Ablation of what the language model perceives: another clip's sound or frames of the same split, or silence. What
    SAM sees, the masks and the pictures stay the row's own."""
    seed: int = 0
    """Decides which clips the probe exchanges."""
    repeated: bool = False
    """Keep the newest clip as it was decoded and preprocessed: rows of one clip follow each other. At SAM's 1024 pixels
    ten frames take 126 MB per decoding process."""


class Packed(Generic[T]):
    """A list in one block of memory; each access makes a new object, equal to the one that was packed.

    A forked worker shares its parent's memory until one of the two writes to it, and Python writes to every object it
    touches (its reference count). Over an epoch each worker would come to own a copy of all rows; a block of pickles is
    only ever read.
    """

    def __init__(self, items: Iterable[T]) -> None:
        blobs = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([0, *map(len, blobs)], dtype=np.int64)
        self._block = np.frombuffer(b"".join(blobs), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> T:
        """Item i. Raises IndexError, so that a loop over the list ends; a slice is refused (TypeError)."""
        number = range(len(self))[operator.index(i)]
        return pickle.loads(self._block[self._ends[number] : self._ends[number + 1]].data)


class ClipDataset(Dataset[Sample]):
    """Rows of one benchmark as samples.

    Args:
        index: says where media lie.
        rows: the rows, in the order of `dataset[i]`.
        processor: preprocessing at the model's sizes.
        prompts: writes prompt and answer ids.
        cot: reasoning records by row number, of every row; may be left out if no answer kind is one of NEED_REASONING.
        settings: see ClipSettings.

    Raises:
        DataError: rows without a reasoning, a reasoning of another uid, a probe over fewer than two clips.
    """

    def __init__(
        self,
        index: ClipIndex,
        rows: Sequence[Row],
        processor: AuroraProcessor,
        prompts: Prompts,
        cot: Mapping[int, CotRecord] | None = None,
        settings: ClipSettings = ClipSettings(),
    ) -> None:
        if settings.probe not in PROBES:
            raise ValueError(f"probe = {settings.probe!r}: must be one of {', '.join(PROBES)}. Remedy: set eval.probe.")
        self.index, self.rows = index, Packed(rows)
        self.processor, self.prompts, self.settings = processor, prompts, settings
        cot = cot or {}
        if cot or settings.answer in NEED_REASONING or settings.teacher_answer in NEED_REASONING:
            _check_reasoning(rows, cot)
        self.records = Packed(cot.get(row.row) for row in rows)
        self._newest: dict[str, tuple[str, Any]] = {}
        self._other: dict[tuple[str, str], str] = {}
        if settings.probe in ("shuffle_audio", "shuffle_video"):
            for split in sorted({row.split for row in self.rows}):
                exchanged = derangement(index.clips(split), settings.seed)
                self._other.update({(split, clip): other for clip, other in exchanged.items()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        """Decode and preprocess row i.

        Raises:
            DataError: the sample's uid and row, the file, the rule and the remedy.
        """
        row = self.rows[i]
        try:
            return self._sample(row, self.records[i])
        except (DataError, ValueError) as error:
            raise DataError(f"sample {row.uid} (row {row.row}): {error}") from error

    def _sample(self, row: Row, record: CotRecord | None) -> Sample:
        settings, processor = self.settings, self.processor
        frames = self._keep("frames", row.clip, lambda: self._frames(row.clip))
        # The probe exchanges what the language model sees. SAM keeps the row's own frames: with others no mask could
        # be right, whatever the answer.
        video_clip = self._other[row.split, row.clip] if settings.probe == "shuffle_video" else row.clip
        seen = frames if video_clip == row.clip else self._keep("seen", video_clip, lambda: self._frames(video_clip))
        if len(seen) != len(frames):
            raise DataError(
                f"{len(frames)} frames, but those of clip {video_clip}, exchanged for them, are {len(seen)}. "
                "Remedy: set data.num_frames, or choose another probe."
            )
        masks, labelled = read_truth(
            self.index, row, tuple(frames.shape[1:3]), settings.num_frames, settings.max_image_pixels
        )
        sam_pixels, sam_size = self._keep("sam", row.clip, lambda: processor.sam_pixels(frames))
        fbank, audio_key = self._sound(row)
        return Sample(
            row=row.row,
            uid=row.uid,
            clip=row.clip,
            split=str(row.split),
            class_name=row.class_name,
            reference=row.reference,
            kind=row.kind,
            pixel_values=self._keep("vision", video_clip, lambda: processor.vision_pixels(seen)),
            sam_pixels=sam_pixels,
            sam_size=sam_size,
            fbank=fbank,
            masks=torch.from_numpy(masks),
            labelled=labelled,
            prompt_ids=self.prompts.prompt_ids(row.reference),
            answer_ids=self._answer(row, settings.answer, record),
            teacher_ids=self._answer(row, settings.teacher_answer, record),
            video_key=video_clip,
            audio_key=audio_key,
            label_start=self._label_start(record),
            frames=frames if settings.keep_frames else None,
            truth=row.truth,
        )

    def _frames(self, clip: str) -> np.ndarray:
        settings = self.settings
        return read_frames(self.index.frames_folder(clip), settings.num_frames, settings.max_image_pixels)

    def _sound(self, row: Row) -> tuple[Tensor, str]:
        """float32 [F,K] and the name of what is heard."""
        probe = self.settings.probe
        clip = self._other[row.split, row.clip] if probe == "shuffle_audio" else row.clip
        fbank = self._keep("sound", clip, lambda: self._fbank(clip))
        return fbank, f"{clip}#silent" if probe == "zero_audio" else clip

    def _fbank(self, clip: str) -> Tensor:
        path = self.index.audio_path(clip)
        wave = read_audio(path, self.processor.sample_rate, self.settings.max_audio_seconds)
        if self.settings.probe == "zero_audio":
            wave = np.zeros_like(wave)
        try:
            return self.processor.fbank(wave)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _keep(self, part: str, clip: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave for the row before if that was of the same clip."""
        if not self.settings.repeated:
            return make()
        known, value = self._newest.get(part, (None, None))
        if known != clip:
            value = make()
            self._newest[part] = clip, value
        return value

    def _answer(self, row: Row, kind: AnswerKind | None, record: CotRecord | None) -> Tensor:
        if kind is None:
            return torch.empty(0, dtype=torch.int64)
        return self.prompts.answer_ids(kind, row.class_name, None if record is None else record.reasoning)

    def _label_start(self, record: CotRecord | None) -> int:
        """First answer token that counts in the cross entropy."""
        if self.settings.answer != "reasoning" or record is None:
            return 0
        return self.prompts.answer_start(record.reasoning, record.loss_from)


def derangement(clips: Sequence[str], seed: int) -> dict[str, str]:
    """Each clip -> another clip, all distinct: one random cycle through all of them.

    Raises:
        DataError: fewer than two clips.
    """
    if len(clips) < 2:
        raise DataError(f"{len(clips)} clips: an exchange needs two. Remedy: choose a larger split or another probe.")
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    return {clips[a]: clips[b] for a, b in zip(order, [*order[1:], order[0]], strict=True)}


def _check_reasoning(rows: Sequence[Row], cot: Mapping[int, CotRecord]) -> None:
    missing = [row for row in rows if row.row not in cot]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} rows have no reasoning, first {missing[0].uid} (row {missing[0].row}). "
            "Remedy: complete data.cot, or set data.incomplete_reasoning to drop."
        )
    for row in rows:
        if cot[row.row].uid != row.uid:
            raise DataError(
                f"row {row.row}: the reasoning is about {cot[row.row].uid}, the metadata row is {row.uid}. "
                "Remedy: use the reasoning file of this metadata.csv."
            )
