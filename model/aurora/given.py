"""Masks for answers that are given, not generated: what the mask side does when the words are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.aurora.model import AuroraModel, evaluating
from utils.answers import parse_answer
from utils.types import Batch, Prediction


@torch.no_grad()
def predict_given(model: AuroraModel, batch: Batch, texts: Sequence[str]) -> list[Prediction]:
    """Read the batch's target answers and decode their masks.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch: B clips with `answer_ids`, each holding [SEG].
        texts: the same answers as text, for the predictions.

    Returns:
        B predictions in the order of the batch; masks are float32 logits at native size, on the model's device.

    Raises:
        ValueError: an answer without [SEG].
    """
    with evaluating(model):
        packed = model.pack(batch, batch.answers)
        without = [s.uid for s, seg in zip(batch.samples, packed.has_seg.tolist(), strict=True) if not seg]
        if without:
            raise ValueError(f"the answers of {', '.join(without)} hold no [SEG]; set data.answer to another kind")
        low = model(packed, model.encode(batch)).mask_logits
    return [
        Prediction(sample.row, text, parse_answer(text), model.segmenter.upscale(low[i], sam_size, size), True)
        for i, (sample, text, sam_size, size) in enumerate(
            zip(batch.samples, texts, batch.sam_sizes, batch.mask_sizes, strict=True)
        )
    ]
