"""Decoded media -> inputs of the three towers (square frames, SAM's pixels, log-mel energies); samples -> a batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.fbank import SAMPLE_RATE, kaldi_fbank, layout_clips, whisper_log_mel
from dataset.prompt import Prompts, SystemPrompt, load_tokenizer
from utils.errors import DataError
from utils.types import Batch, Sample

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)
"""RGB, on 0..255 (segment_anything, build_sam.py)."""
PAD_GREY = 127
"""Colour of the square that frames are pasted on: int(0.5 * 255), upstream's expand2square."""

FrameResize = Literal["warp", "pad"]
SegmenterName = Literal["sam", "sam2"]
SAM_RESIZE: dict[SegmenterName, FrameResize] = {"sam": "pad", "sam2": "warp"}
"""How each segmenter's frames fill its square: SAM's long side, zeros behind it; SAM 2 stretches them
(transformers, Sam2ImageProcessor). Mean and deviation are the same: those of ImageNet."""

SETTINGS = "preprocessor_config.json"
_LATER = {"segmenter", "frame_mean", "frame_std", "sound"}
_calls = itertools.count()

_STACKED = {
    "pixel_values": "frames for the vision tower; clips of a batch need the same number of frames (data.num_frames)",
    "sam_pixels": "frames for SAM; clips of a batch need the same number of frames (data.num_frames)",
    "fbank": "sounds; clips of a batch need the same length (data.audio_padding_seconds)",
}
_LISTED = ("masks", "prompt_ids", "answer_ids", "teacher_ids")


@dataclass(eq=False, repr=False)
class AuroraProcessor:
    """Preprocessing with the sizes of one model; keeps the tokenizer, so that one object carries all a clip needs."""

    tokenizer: PreTrainedTokenizerBase
    """Of the language model."""
    vision_size: int
    """P, side of the vision tower's square input, pixels."""
    sam_size: int
    """Z, side of SAM's square input, pixels."""
    mel_bins: int = 128
    """K of the filter bank (128 as released)."""
    audio_padding_seconds: float | None = 30.0
    """Length to which the sound is padded with silence (30 as in the released code); None = not padded."""
    frame_resize: FrameResize = "warp"
    """"warp" stretches frames to the square (released code); "pad" pastes them on a grey square first."""
    audio_windows: int | None = 10
    """One-second windows taken of the sound (10 as in the released code); None = the whole sound."""
    system_prompt: SystemPrompt = "llama2"
    """Name of the system turn (`dataset.prompt.SYSTEM_PROMPTS`), for calls of the processor."""
    seg_token: str = "[SEG]"
    """The segmentation token, a token of the tokenizer."""
    segmenter: SegmenterName = "sam"
    """Whose frames `sam_pixels` prepares."""
    frame_mean: Sequence[float] = (0.5, 0.5, 0.5)
    frame_std: Sequence[float] = (0.5, 0.5, 0.5)
    sound: Literal["fbank", "log_mel"] = "fbank"
    """These three as in `MediaFormat`; the defaults are VideoLLaMA2's."""

    sample_rate: ClassVar[int] = SAMPLE_RATE

    def __post_init__(self) -> None:
        if self.frame_resize not in ("warp", "pad"):
            raise ValueError(
                f"frame_resize = {self.frame_resize!r}: must be warp or pad. Remedy: set data.frame_resize."
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> AuroraProcessor:
        """The processor of an exported folder, with its tokenizer; `changes` replace single settings.

        Raises:
            DataError: no settings or tokenizer there, or a setting that is unknown.
        """
        path, known = Path(folder) / SETTINGS, _setting_names()
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            # Folders that were written before there was a choice do not say how frames and sound are prepared.
            asked = [name for name in known if name in settings or name not in _LATER]
            values = {name: settings[name] for name in asked} | changes
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not readable ({error!r}). Remedy: export again (scripts/export.py).") from error
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise DataError(f"unknown settings {unknown}. Remedy: use {', '.join(known)}.")
        tokenizer, _ = load_tokenizer(folder, values["seg_token"])
        return cls(tokenizer, **values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings and the tokenizer, with its segmentation token, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        settings = {"processor_class": type(self).__name__, **{name: getattr(self, name) for name in _setting_names()}}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def __call__(
        self,
        frames: np.ndarray | Sequence[np.ndarray],
        sound: np.ndarray | Sequence[np.ndarray],
        reference: str | Sequence[str],
    ) -> Batch:
        """Clips and questions as the model reads them, ready for `model.aurora.inference.predict`.

        Args:
            frames: uint8 [T,H,W,3] RGB of one clip, or one such array per clip (equal T).
            sound: float32 [samples] mono at `sample_rate`, or one per clip.
            reference: what to segment, or one per clip.

        Returns:
            Batch without targets; its masks are empty and only give the native sizes.

        Raises:
            ValueError: unequal numbers of clips, sounds and references, or a sound that is too short.
        """
        if isinstance(reference, str):
            frames, sound, reference = [frames], [sound], [reference]
        if not len(frames) == len(sound) == len(reference):
            raise ValueError(f"{len(frames)} clips, {len(sound)} sounds and {len(reference)} references: counts differ")
        seg_id = self.tokenizer.convert_tokens_to_ids(self.seg_token)
        prompts = Prompts(self.tokenizer, seg_id, self.system_prompt)
        return collate([self._sample(*item, prompts) for item in zip(frames, sound, reference, strict=True)])

    def _sample(self, frames: np.ndarray, sound: np.ndarray, reference: str, prompts: Prompts) -> Sample:
        sam_pixels, sam_size = self.sam_pixels(frames)
        number, nothing = next(_calls), torch.empty(0, dtype=torch.int64)
        key = f"call {number}"  # names the media for feature caches; never the same twice
        return Sample(
            row=number, uid=key, clip=key, split="", class_name="", reference=reference.strip(), kind="",
            pixel_values=self.vision_pixels(frames), sam_pixels=sam_pixels, sam_size=sam_size, fbank=self.fbank(sound),
            masks=torch.zeros(frames.shape[:3], dtype=torch.bool), prompt_ids=prompts.prompt_ids(reference.strip()),
            answer_ids=nothing, teacher_ids=nothing, video_key=key, audio_key=key,
        )  # fmt: skip

    def vision_pixels(self, frames: np.ndarray) -> Tensor:
        """The vision tower's preprocessing: PIL bicubic to P x P, then normalised.

        Args:
            frames: uint8 [T,H,W,3] RGB.

        Returns:
            float32 [T,3,P,P].
        """
        if self.frame_resize == "pad":
            frames = _on_square(frames)
        resized = _resize(frames, (self.vision_size, self.vision_size), Image.Resampling.BICUBIC)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (self.frame_mean, self.frame_std))
        return _channels_first(resized).div_(255.0).sub_(mean).div_(std)

    def sam_pixels(self, frames: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """SAM's preprocessing: long side to Z with PIL bilinear, normalised, zeros at the bottom and right.

        SAM 2's: stretched to the square with PIL bilinear, normalised.

        Args:
            frames: uint8 [T,H,W,3] RGB.

        Returns:
            float32 [T,3,Z,Z], and (height, width) inside it before padding.
        """
        stretched = SAM_RESIZE[self.segmenter] == "warp"
        size = (self.sam_size,) * 2 if stretched else sam_inner_size(*frames.shape[1:3], self.sam_size)
        pixels = _channels_first(_resize(frames, size, Image.Resampling.BILINEAR))
        pixels.sub_(torch.tensor(SAM_MEAN).view(3, 1, 1)).div_(torch.tensor(SAM_STD).view(3, 1, 1))
        if size == (self.sam_size, self.sam_size):
            return pixels, size
        return torch.nn.functional.pad(pixels, (0, self.sam_size - size[1], 0, self.sam_size - size[0])), size

    def fbank(self, wave: np.ndarray) -> Tensor:
        """Log-mel energies of a sound, as the audio tower reads them: windows joined, silence appended.

        Args:
            wave: float32 [samples], mono, at `sample_rate`.

        Returns:
            float32 [F,K].

        Raises:
            ValueError: shorter than 25 ms, or longer than the padded length.
        """
        sound = torch.from_numpy(wave)
        if self.audio_windows is not None:
            sound = layout_clips(sound, self.audio_windows)
        padding = self.audio_padding_seconds
        samples = None if padding is None else round(padding * self.sample_rate)
        if self.sound == "log_mel":
            return whisper_log_mel(sound, self.mel_bins)
        return kaldi_fbank(sound, self.mel_bins, samples)


@dataclass
class LoadedBatch(Batch):
    """A batch as the loader hands it out: knows how to pin its tensors for a quick copy to CUDA."""

    def pin_memory(self) -> LoadedBatch:
        """Called by the loader's pinning thread."""
        pinned = {name: getattr(self, name).pin_memory() for name in _STACKED}
        return replace(self, **pinned, masks=[m.pin_memory() for m in self.masks])


def collate(samples: Sequence[Sample]) -> LoadedBatch:
    """Stack what must be equal, keep lists of what may differ (text lengths, native mask sizes).

    The samples share the batch's memory, and lists of tensors share one block each: nothing crosses a process boundary
    twice, and a batch takes seven open files there, however many samples it holds.

    Raises:
        DataError: no sample, or unequal frame counts, pixel sizes or sound lengths; names the samples.
    """
    if not samples:
        raise DataError("an empty batch. Remedy: choose rows that exist.")
    parts = {name: _stack(samples, name) for name in _STACKED}
    for sample in samples:
        if len(sample.masks) != len(sample.pixel_values):
            raise DataError(
                f"sample {sample.uid} (row {sample.row}): {len(sample.masks)} masks, "
                f"{len(sample.pixel_values)} frames; each frame has one mask. Remedy: restore the clip."
            )
    views = parts | {name: _joined([getattr(s, name) for s in samples]) for name in _LISTED}
    shared = [replace(s, **{name: view[i] for name, view in views.items()}) for i, s in enumerate(samples)]
    return LoadedBatch(shared, **parts, masks=[s.masks for s in shared])


def _stack(samples: Sequence[Sample], name: str) -> Tensor:
    tensors = [getattr(s, name) for s in samples]
    for sample, tensor in zip(samples, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise DataError(
                f"{name}: sample {samples[0].uid} (row {samples[0].row}) has {list(tensors[0].shape)}, "
                f"{sample.uid} (row {sample.row}) has {list(tensor.shape)}: {_STACKED[name]}. "
                "Remedy: set that option, or a batch of 1."
            )
    return torch.stack(tensors)


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as views of one block."""
    flat = torch.cat([t.flatten() for t in tensors]).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(flat, tensors, strict=True)]


def sam_inner_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) with the long side at `side` and the ratio kept (segment_anything, ResizeLongestSide)."""
    scale = side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def _resize(frames: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """uint8 [T,h,w,3]; frames that have the size already are returned as they are."""
    if frames.shape[1:3] == size:
        return frames
    height, width = size
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), method)) for f in frames])


def _on_square(frames: np.ndarray) -> np.ndarray:
    """Frames centred on a grey square of their long side."""
    count, height, width, _ = frames.shape
    side = max(height, width)
    square = np.full((count, side, side, 3), PAD_GREY, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = frames
    return square


def _channels_first(frames: np.ndarray) -> Tensor:
    """float32 [T,3,H,W], contiguous, 0..255."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float()


def _setting_names() -> list[str]:
    """What `save_pretrained` writes beside the tokenizer, sorted."""
    return sorted(field.name for field in fields(AuroraProcessor) if field.name != "tokenizer")
