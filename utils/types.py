"""The typed carriers that cross module boundaries, and the one table of shape letters.

Shape letters, used in every docstring of the project:

    B  batch (clips with one reference each)     G  group (answers sampled per clip)
    Q  [SEG] queries: masks that answers ask for  R  answers of a group, B * G
    T  video frames                              N  patches per frame
    M  media tokens (video, then audio)          L  text tokens
    S  spliced length: text + media, padded      D  width of the language model
    V  vocabulary                                C  width of a SAM prompt (256; 64 at mini size)
    H, W  pixels of a frame at its native size   h, w  SAM's image-embedding grid
    F  fbank frames (10 ms each)                 K  mel bins
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that takes no part in the cross entropy (the convention of torch and transformers)."""

VIDEO_PLACEHOLDER = -201
"""Stands in a prompt's ids where [video tokens, audio tokens] are spliced in; never reaches the embedding."""

AUDIO_PLACEHOLDER = -202
"""Stands for audio tokens alone (a prompt about sound without frames)."""

EMPTY_LOGIT = -1e4
"""Mask logit everywhere of an answer that asks for no mask: a probability of 0."""


@dataclass(frozen=True)
class MediaFormat:
    """What a backbone reads of a clip; `dataset.processor` prepares it so."""

    frame_size: int  # P: side of the square frames, in pixels
    mel_bins: int  # K
    frame_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # RGB, of frames in [0, 1]
    frame_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sound: Literal["fbank", "log_mel"] = "fbank"  # Kaldi's filter bank, or Whisper's log-mel spectrogram
    frame_step: int | None = None  # frames may have any side that is a multiple of it; None = `frame_size` alone


@dataclass(frozen=True)
class Sample:
    """One metadata row with its media decoded and preprocessed (made in a worker process by `dataset.clips`)."""

    row: int  # row number in metadata.csv (0-based, header excluded): the key of every result
    uid: str
    clip: str  # folder of the clip under media/ and gt_mask/: `uid.rsplit('_', 2)[0]`
    split: str
    class_name: str
    reference: str  # the referring expression, stripped of outer spaces
    kind: str  # question kind (mini world), or "" where the data does not tell it
    pixel_values: Tensor  # float32 [T,3,P,P]: frames for the vision tower, normalised as its MediaFormat says
    sam_pixels: Tensor
    """float32 [T,3,Z,Z]: frames for SAM: long side Z, normalised, zero-padded at the bottom and right."""
    sam_size: tuple[int, int]  # (height, width) inside `sam_pixels` before padding
    fbank: Tensor  # float32 [F,K]: log-mel energies, of the kind that the MediaFormat names
    masks: Tensor
    """bool [T,H,W]: ground truth at native size; all False for a null row, and on frames that nobody annotated."""
    prompt_ids: Tensor  # int64 [L]: chat prompt up to and including the assistant header, with VIDEO_PLACEHOLDER
    answer_ids: Tensor  # int64 [L]: the target answer with its <|im_end|>; empty at evaluation
    teacher_ids: Tensor  # int64 [L]: the answer that the distillation teacher reads; empty where no teacher is used
    video_key: str
    """Names the frames of `pixel_values` (the clip, or another one under a probe): features of frozen towers are cached
    by it. `sam_pixels` are always the clip's own."""
    audio_key: str  # names the sound of `fbank` in the same way
    label_start: int = 0
    """First token of `answer_ids` that counts in the cross entropy (reflective paths: the correction may count alone);
    the tokens before it are read all the same."""
    frames: np.ndarray | None = None  # uint8 [T,H,W,3] RGB at native size, kept only where pictures are asked for
    truth: dict | None = None  # what the mini world knows of the row's true chain; None for real data
    labelled: tuple[int, ...] | None = None
    """Frames whose mask was annotated, in rising order; None = all. Losses, rewards and scores read no others."""


@dataclass
class Batch:
    """B samples collated. Tensors share the order of `samples`; ragged fields stay lists."""

    samples: list[Sample]
    pixel_values: Tensor  # float32 [B,T,3,P,P]
    sam_pixels: Tensor  # float32 [B,T,3,Z,Z]
    fbank: Tensor  # float32 [B,F,K]
    masks: list[Tensor]  # B x bool [T,H,W]

    def __len__(self) -> int:
        return len(self.samples)

    def clip(self, number: int) -> Batch:
        """One sample as a batch of its own."""
        rows = slice(number, number + 1)
        return Batch(
            self.samples[rows], self.pixel_values[rows], self.sam_pixels[rows], self.fbank[rows], self.masks[rows]
        )

    @property
    def prompts(self) -> list[Tensor]:
        return [s.prompt_ids for s in self.samples]

    @property
    def answers(self) -> list[Tensor]:
        return [s.answer_ids for s in self.samples]

    @property
    def sam_sizes(self) -> list[tuple[int, int]]:
        return [s.sam_size for s in self.samples]

    @property
    def mask_sizes(self) -> list[tuple[int, int]]:
        return [tuple(m.shape[-2:]) for m in self.masks]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move the tensors; `dtype` applies to pixels only (the fbank stays float32 until it is normalised)."""
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, dtype, non_blocking=True),
            sam_pixels=self.sam_pixels.to(device, dtype, non_blocking=True),
            fbank=self.fbank.to(device, non_blocking=True),
            masks=[m.to(device, non_blocking=True) for m in self.masks],
        )


@dataclass
class MediaFeatures:
    """What the towers say of B clips; computed once per clip, shared by all answers about it."""

    video: Tensor | None  # [B,Mv,D] video tokens, or None for sound alone
    audio: Tensor | None  # [B,Ma,D] audio tokens, or None for frames alone
    image_embeddings: Tensor | None = None  # [B,T,C,h,w] SAM image embeddings, or None where no mask is wanted

    def repeat(self, group: int) -> MediaFeatures:
        """Each clip `group` times in a row: [B*group, ...]."""

        def again(features: Tensor | None) -> Tensor | None:
            return None if features is None else features.repeat_interleave(group, 0)

        return MediaFeatures(again(self.video), again(self.audio), again(self.image_embeddings))


@dataclass
class PackedInputs:
    """Text and media positions of a whole batch, aligned. Made by the backbone's `layout`; holds no features.

    Masks are asked for by queries, not by answers: an answer without [SEG] has none, one about two objects would have
    two. In the paper's case Q = B.
    """

    token_ids: Tensor  # int64 [B,S]: text ids; 0 at media and padding positions
    media_index: Tensor
    """int64 [B,S]: index into the row's media tokens (video first, then audio), -1 at text and padding."""
    labels: Tensor  # int64 [B,S]: IGNORE except at answer tokens. labels[b, s] is the token AT s (shift when scoring).
    attention_mask: Tensor  # bool [B,S]: False at padding (right padding)
    position_ids: Tensor  # int64 [B,S], or [3,B,S] (time, height, width) for a decoder that reads such positions
    answer_of_query: Tensor  # int64 [Q]: the row that asks for a mask, in rising order
    position_of_query: Tensor  # int64 [Q]: where in the row its [SEG] stands

    @property
    def has_seg(self) -> Tensor:
        """bool [B]: whether the answer asks for a mask."""
        return _asked(self.answer_of_query, len(self.token_ids))

    @property
    def seg_positions(self) -> Tensor:
        """int64 [B]: position of the answer's last query, -1 without one."""
        positions = torch.full_like(self.token_ids[:, 0], -1)
        return positions.scatter_reduce(0, self.answer_of_query, self.position_of_query, "amax")

    def to(self, device: torch.device | str) -> PackedInputs:
        return PackedInputs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class AuroraOutput(NamedTuple):
    """What one forward of the joint model gives. Fields not asked for are None.

    A tuple, because DeepSpeed hooks the tensors of tuples, lists and dicts alone: without its hooks, gradients that are
    offloaded are accumulated wrongly (tests/test_accumulation.py).
    """

    answer_logits: Tensor | None
    """[A,V] logits that predict the A labelled tokens of the batch, in row-major order of `labels`."""
    answer_labels: Tensor | None  # int64 [A]
    seg_features: Tensor  # [Q,C] projected hidden state AT [SEG] (f_s of eq. 2)
    mask_logits: Tensor | None
    """[Q,T or k,4h,4w] low-resolution mask logits, still padded; None without image embeddings."""


@dataclass
class GroupInputs:
    """B prompts and the R = B * G answers behind them; row b * G + g is answer g of prompt b."""

    prompts: PackedInputs  # B rows without their last token, right padded
    token_ids: Tensor
    """int64 [R,L]: the prompt's last token, then the answer, right padded with 0. The answer's own last token is only
    there if it is [SEG]: nothing else reads its hidden state."""
    targets: Tensor  # int64 [R,L]: the answer's token that each position predicts, IGNORE elsewhere
    answer_of_query: Tensor  # int64 [Q]: the answer that asks for a mask, in rising order
    position_of_query: Tensor  # int64 [Q]: where `token_ids` holds its [SEG]
    group: int
    temperature: float  # the logits are divided by it, as in sampling

    @property
    def mask(self) -> Tensor:
        """bool [R,L]: positions that predict a token of an answer."""
        return self.targets != IGNORE


class GroupOutput(NamedTuple):
    """What a pass over R answers gives. A tuple, because DeepSpeed's backward hooks see tensors in tuples alone."""

    log_probs: Tensor  # float32 [R,L]: of `GroupInputs.targets`, 0 where there is none
    entropy: Tensor  # float32 [R,L]: of the distributions they come from, without gradient, 0 where there is none
    seg_features: Tensor  # [Q,C] projected hidden state AT [SEG]
    mask_logits: Tensor | None  # [Q,T or k,4h,4w] low-resolution mask logits; None without image embeddings


@dataclass
class StepLoss:
    """A differentiable total and the detached scalars to log, under the paper's names."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Generation:
    """R sampled or greedy answers."""

    token_ids: list[Tensor]  # answer ids, <|im_end|> included if it was reached
    texts: list[str]  # decoded answers without <|im_end|>
    seg_hidden: Tensor  # [Q,D] final-norm hidden state at each query's [SEG], captured as it was produced
    answer_of_query: Tensor  # int64 [Q]: the answer that asks for a mask, in rising order
    truncated: Tensor  # bool [R]: stopped by the length limit before <|im_end|>
    log_probs: list[Tensor] | None = None
    """Per answer [L] float32 log-probabilities of the drawn tokens under the sampling distribution."""

    @property
    def has_seg(self) -> Tensor:
        """bool [R]: whether the answer asks for a mask."""
        return _asked(self.answer_of_query, len(self.texts))


@dataclass
class Prediction:
    """The model's answer about one clip and reference."""

    row: int
    text: str  # the whole answer
    class_name: str | None  # X of "the target is X", or None if it cannot be parsed
    mask_logits: Tensor  # float32 [T,H,W] at native size; a failed generation (no [SEG]) holds EMPTY_LOGIT
    has_seg: bool


def _asked(answer_of_query: Tensor, answers: int) -> Tensor:
    return torch.zeros(answers, dtype=torch.bool, device=answer_of_query.device).index_fill(0, answer_of_query, True)
