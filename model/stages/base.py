"""What every stage is, and what the supervised ones share.

A stage is `prepare(batch)` without gradient, then `loss(prepared)` with it, once per update. `self.engine` is called
for the forward whose output is differentiated; it is a DeepSpeed engine or the bare model. Everything else goes
through `self.model`, the `AuroraModel` itself.

Losses of a `StepLoss` stand under the paper's names and are already multiplied by their weights, as the released code
logs them (LISA_sft_distill.py:434-446): loss = ce_loss + mask_loss + distill_loss, mask_loss = mask_bce_loss +
mask_dice_loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from configs.schema import LossConfig, RunConfig
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.objectives.mask import MaskLosses, loss_shape, mask_losses, shrink_target
from utils.types import AuroraOutput, Batch, MediaFeatures, PackedInputs, StepLoss


class Stage(ABC):
    """One training stage.

    Args:
        config: the run.
        engine: DeepSpeed engine around an `AuroraModel`, or the bare model.
        tokenizer: for stages that write or read text.
    """

    updates = 1  # optimiser steps on each prepared batch

    def __init__(self, config: RunConfig, engine: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.config, self.engine, self.tokenizer = config, engine, tokenizer

    @property
    def model(self) -> AuroraModel:
        """The joint model inside the engine."""
        return getattr(self.engine, "module", self.engine)

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """What one batch needs before its loss, made without gradient: the batch itself as `.batch`, and as `.answers`
        the answers that were drawn about it (`Generation`), or None."""

    @abstractmethod
    def loss(self, prepared: Any) -> StepLoss:
        """The differentiable loss of a prepared batch and its parts to log."""

    def records(self, prepared: Any) -> list[dict[str, Any]]:
        """Answers about a prepared batch as records for samples.jsonl; greedy ones, where training draws none."""
        found = predict(self.model, prepared.batch, self.tokenizer, self.config.eval.max_new_tokens)
        return [
            {"row": s.row, "uid": s.uid, "reference": s.reference, "answer": p.text, "has_seg": p.has_seg}
            for s, p in zip(prepared.batch.samples, found, strict=True)
        ]


@dataclass
class Prepared:
    """A batch laid out for a teacher-forced pass."""

    batch: Batch
    packed: PackedInputs
    frame_index: Tensor | None  # int64 [B,k] frames that get a mask loss; None = all T
    teacher_features: Tensor | None = None  # [B,C] f_t of paper eq. 2, or None without distillation
    media: MediaFeatures | None = None
    """Video and sound as they were encoded for the teacher; None = encoded in the loss."""
    answers: None = None  # a supervised stage draws none


class SupervisedStage(Stage):
    """Cross entropy of the target answer and mask losses at its [SEG] (teacher, SFT and reflective training)."""

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Lay out prompts and answers, and draw the frames that get a mask loss."""
        packed = self.model.pack(batch, batch.answers)
        return Prepared(batch, packed, draw_frames(batch, self.config.model.decode_frames_per_step, self.model.device))

    def loss(self, prepared: Prepared) -> StepLoss:
        """Weighted sum of cross entropy, mask losses and, where a teacher was asked, distillation."""
        batch, packed, frames = prepared.batch, prepared.packed, prepared.frame_index
        # Towers run outside the engine's forward, so that frozen ones may be cached; only what follows is wrapped.
        media = self.model.encode(batch, reuse=prepared.media)
        output = self.engine(packed, media, frames)
        words = cross_entropy(output) if self.model.writes else output.seg_features.new_zeros(())
        masks = query_mask_losses(
            self.model, output.mask_logits, packed.answer_of_query, batch, frames, self.config.loss.mask_side
        )
        return combine(self.config.loss, words, masks, self.distillation(prepared, output))

    def distillation(self, prepared: Prepared, output: AuroraOutput) -> Tensor | None:
        """Unweighted distance to a teacher's features; None = no such term in this stage."""
        return None


def draw_frames(batch: Batch, count: int | None, device: torch.device) -> Tensor | None:
    """int64 [B,k] distinct frames of each clip in rising order, drawn with torch's CPU generator; None = all.

    The released code decodes all 10; fewer cost less, and over the epochs every frame has its turn. Frames without an
    annotated mask are never drawn; k is `count`, or less where a clip has fewer annotated frames.
    """
    frames = batch.sam_pixels.shape[1]
    # On the CPU, whose generator a checkpoint stores: a resumed run draws the same frames.
    pools = [torch.arange(frames) if s.labelled is None else torch.tensor(s.labelled) for s in batch.samples]
    size = min(frames if count is None else count, *(len(pool) for pool in pools))
    if size == frames:
        return None
    return torch.stack([pool[torch.randperm(len(pool))[:size].sort().values] for pool in pools]).to(device)


def cross_entropy(output: AuroraOutput) -> Tensor:
    """Mean over all answer tokens of the batch, in float32 (paper eq. 1, as a mean like the released code)."""
    if not len(output.answer_labels):
        raise ValueError("the batch has no labelled token: every training sample needs answer_ids")
    return F.cross_entropy(output.answer_logits.float(), output.answer_labels)


def query_mask_losses(
    model: AuroraModel,
    mask_logits: Tensor,
    clip_of_query: Tensor,
    batch: Batch,
    frame_index: Tensor | None = None,
    longest: int | None = None,
) -> MaskLosses:
    """BCE and Dice of queries against the masks of their clips: means over the frames of each, then over queries.

    Args:
        model: gives the segmenter's upscaling.
        mask_logits, clip_of_query: [Q,T or k,4h,4w] and int64 [Q].
        batch: B clips with masks at native size.
        frame_index: int64 [B,k], as given to the forward; None = all frames.
        longest: long side in pixels at which the losses are computed (`loss.mask_side`); None = native, as released.
    """
    logits, targets = [], []
    for low, clip in zip(mask_logits, clip_of_query.tolist(), strict=True):
        masks = batch.masks[clip].to(low.device)
        masks = masks if frame_index is None else masks[frame_index[clip]]
        size = loss_shape(tuple(masks.shape[-2:]), longest)
        logits.append(model.segmenter.upscale(low, batch.sam_sizes[clip], size))
        targets.append(shrink_target(masks, size))
    if logits:
        return mask_losses(logits, targets)
    # No query, but a gradient of zero for the decoder: processes must agree on which gradients there are, or their
    # reduction waits for ever.
    zero = mask_logits.float().sum()
    return MaskLosses(zero, zero)


def combine(weights: LossConfig, ce: Tensor, masks: MaskLosses, distill: Tensor | None = None) -> StepLoss:
    """Total and parts, each part times its weight (paper eq. 6 and 7: weights 1; released code 1, 2, 0.5)."""
    bce, dice = weights.bce * masks.bce, weights.dice * masks.dice
    parts = {"ce_loss": weights.ce * ce, "mask_bce_loss": bce, "mask_dice_loss": dice, "mask_loss": bce + dice}
    total = parts["ce_loss"] + parts["mask_loss"]
    if distill is not None:
        parts["distill_loss"] = weights.distill * distill
        total = total + parts["distill_loss"]
    return StepLoss(total, {name: value.detach() for name, value in {"loss": total, **parts}.items()})
