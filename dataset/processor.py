"""Decoded media -> the inputs of the three towers: square frames, SAM's pixels, log-mel energies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.collate import collate
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

SETTINGS = "preprocessor_config.json"
_calls = itertools.count()


class AuroraProcessor:
    """Preprocessing with the sizes of one model; keeps the tokenizer, so that one object carries all a clip needs.

    Args:
        tokenizer: of the language model.
        vision_size: P, side of the vision tower's square input, pixels.
        sam_size: Z, side of SAM's square input, pixels.
        mel_bins: K of the filter bank (128 as released).
        audio_padding_seconds: length to which the sound is padded with silence (30 as published); None = not padded.
        frame_resize: "warp" stretches frames to the square (as published); "pad" pastes them on a grey square first.
        audio_windows: one-second windows taken of the sound (10 as published); None = the whole sound.
        frame_mean, frame_std, sound: as in `MediaFormat`; the defaults are VideoLLaMA2's.
        system_prompt: name of the system turn (`dataset.prompt.SYSTEM_PROMPTS`), for calls of the processor.
        seg_token: the segmentation token, a token of the tokenizer.
    """

    sample_rate: int = SAMPLE_RATE

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vision_size: int,
        sam_size: int,
        mel_bins: int = 128,
        audio_padding_seconds: float | None = 30.0,
        frame_resize: FrameResize = "warp",
        audio_windows: int | None = 10,
        system_prompt: SystemPrompt = "llama2",
        seg_token: str = "[SEG]",
        frame_mean: Sequence[float] = (0.5, 0.5, 0.5),
        frame_std: Sequence[float] = (0.5, 0.5, 0.5),
        sound: Literal["fbank", "log_mel"] = "fbank",
    ) -> None:
        if frame_resize not in ("warp", "pad"):
            raise ValueError(f"frame_resize = {frame_resize!r}: must be warp or pad. Remedy: set data.frame_resize.")
        self.tokenizer = tokenizer
        self.vision_size = vision_size
        self.sam_size = sam_size
        self.mel_bins = mel_bins
        self.audio_padding_seconds = audio_padding_seconds
        self.frame_resize = frame_resize
        self.audio_windows = audio_windows
        self.system_prompt = system_prompt
        self.seg_token = seg_token
        self.frame_mean, self.frame_std, self.sound = tuple(frame_mean), tuple(frame_std), sound

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> AuroraProcessor:
        """The processor of an exported folder, with its tokenizer; `changes` replace single settings.

        Raises:
            DataError: no settings or tokenizer there, or a setting that is unknown.
        """
        path = Path(folder) / SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            # Folders that were written before there was a choice do not say how frames and sound are prepared.
            asked = [name for name in _SAVED if name in settings or name not in _LATER]
            values = {name: settings[name] for name in asked} | changes
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not readable ({error!r}). Remedy: export again (scripts/export.py).") from error
        unknown = sorted(values.keys() - _SAVED)
        if unknown:
            raise DataError(f"unknown settings {unknown}. Remedy: use {', '.join(sorted(_SAVED))}.")
        tokenizer, _ = load_tokenizer(folder, values["seg_token"])
        return cls(tokenizer, **values)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings and the tokenizer, with its segmentation token, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        settings = {"processor_class": type(self).__name__, **{name: getattr(self, name) for name in sorted(_SAVED)}}
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

        Args:
            frames: uint8 [T,H,W,3] RGB.

        Returns:
            float32 [T,3,Z,Z], and (height, width) inside it before padding.
        """
        size = sam_inner_size(frames.shape[1], frames.shape[2], self.sam_size)
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


_SAVED = {
    *("vision_size", "sam_size", "mel_bins", "audio_padding_seconds", "frame_resize", "audio_windows"),
    *("system_prompt", "seg_token", "frame_mean", "frame_std", "sound"),
}
_LATER = {"frame_mean", "frame_std", "sound"}


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
