"""From a clip and a reference to reasoning and masks: for evaluation, failure mining and demos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.aurora.generation import generate
from model.aurora.model import AuroraModel, evaluating
from utils.answers import parse_answer
from utils.types import EMPTY_LOGIT, Batch, Prediction


@torch.no_grad()
def predict(
    model: AuroraModel,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    repetition_penalty: float | None = None,
) -> list[Prediction]:
    """Greedy answers and their masks.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch: B clips; `masks` only give the native sizes.
        tokenizer: of the model, with [SEG].
        max_new_tokens: longest answer in tokens.
        repetition_penalty: of the greedy choice; None = as generation_config.json of the base says.

    Returns:
        B predictions in the order of the batch; masks are float32 logits at native size, on the model's device. An
        answer without [SEG] is a failed generation: its mask is empty and `has_seg` is False.
    """
    with evaluating(model):
        # Clips are encoded once, for the words and for the masks.
        media, answers = model.encode(batch), None
        if model.writes:
            greedy = model.generation_defaults.greedy(repetition_penalty)
            answers = generate(model, batch, media, tokenizer, max_new_tokens, sampling=greedy)
        # The states at [SEG] were kept while the words were drawn, so that no answer is read twice.
        prompts, asked = model.drawn_queries(answers, batch, media)
        low = model.decode_masks(prompts, asked, media.image_embeddings)
    return _predictions(model, batch, [""] * len(batch) if answers is None else answers.texts, low, asked)


@torch.no_grad()
def predict_given(model: AuroraModel, batch: Batch, texts: Sequence[str]) -> list[Prediction]:
    """Masks for answers that are given, not generated: what the mask side does when the words are right.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch: B clips with `answer_ids`, each holding [SEG].
        texts: the same answers as text, for the predictions.

    Returns:
        As `predict`.

    Raises:
        ValueError: an answer without [SEG].
    """
    with evaluating(model):
        packed = model.pack(batch, batch.answers)
        without = [s.uid for s, seg in zip(batch.samples, packed.has_seg.tolist(), strict=True) if not seg]
        if without:
            raise ValueError(f"the answers of {', '.join(without)} hold no [SEG]; set data.answer to another kind")
        low = model(packed, model.encode(batch)).mask_logits
    return _predictions(model, batch, texts, low, packed.answer_of_query)


def answer_mask(low: Tensor, answer_of_query: Tensor, answer: int) -> Tensor | None:
    """Mask logits [T,h,w] of one answer among those [Q,T,h,w] of all queries; None if it asks for none.

    Where an answer asks several times, a pixel belongs to its mask if it belongs to one of them.
    """
    own = low[answer_of_query == answer]
    return own.amax(0) if len(own) else None


def _predictions(
    model: AuroraModel, batch: Batch, texts: Sequence[str], low: Tensor, answer_of_query: Tensor
) -> list[Prediction]:
    found = []
    for clip, (sample, text, size) in enumerate(zip(batch.samples, texts, batch.mask_sizes, strict=True)):
        own = answer_mask(low, answer_of_query, clip)
        if own is None:
            logits = torch.full((low.shape[1], *size), EMPTY_LOGIT, device=low.device)
        else:
            logits = model.segmenter.upscale(own, sample.sam_size, size)
        found.append(Prediction(sample.row, text, parse_answer(text), logits, own is not None))
    return found
