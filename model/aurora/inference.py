"""From a clip and a reference to reasoning and masks: greedy answers for evaluation, failure mining and demos.

An answer without [SEG] is a failed generation: its mask is empty and `has_seg` is False. The published evaluation
instead appends "It is [SEG]." behind the answer and decodes that (LISA_sft_distill.py:252-255), which hides how often
the format fails; `fallback="append"` does the same, and `has_seg` still tells that the model itself wrote none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.aurora.generation import generate
from model.aurora.model import EMPTY_LOGIT, AuroraModel, evaluating
from utils.answers import ENDING, parse_answer
from utils.types import Batch, Generation, MediaFeatures, Prediction


@torch.no_grad()
def predict(
    model: AuroraModel,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    fallback: Literal["empty", "append"] = "empty",
    repetition_penalty: float | None = None,
) -> list[Prediction]:
    """Greedy answers and their masks.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch: B clips; `masks` only give the native sizes.
        tokenizer: of the model, with [SEG].
        max_new_tokens: longest answer in tokens.
        repetition_penalty: of the greedy choice; None = as generation_config.json of the base says.
        fallback: what an answer without [SEG] gets: an empty mask, or the mask of an appended "It is [SEG].".

    Returns:
        B predictions in the order of the batch; masks are float32 logits at native size, on the model's device.

    Raises:
        ValueError: unknown fallback.
    """
    if fallback not in ("empty", "append"):
        raise ValueError(f"fallback is {fallback!r}; must be 'empty' or 'append'")
    with evaluating(model):
        media = model.encode(batch)
        answers = None
        if model.prompter.writes:
            greedy = model.generation_defaults.greedy(repetition_penalty)
            answers = generate(model, batch, media, tokenizer, max_new_tokens, sampling=greedy)
        texts = [""] * len(batch) if answers is None else answers.texts
        if model.prompter.always_asks:
            packed = model.pack(batch, None if answers is None else answers.token_ids)
            features = model.seg_features(model.hidden_states(packed, media), packed)
            asked = decodable = packed.has_seg
        else:
            hidden, asked = answers.seg_hidden, answers.has_seg
            decodable = asked
            if fallback == "append" and not bool(asked.all()):
                hidden, decodable = _append_seg(model, batch, media, tokenizer, answers)
            features = model.project(hidden).masked_fill(~decodable[:, None], 0)
        low = model.decode_masks(features, decodable, media.image_embeddings)
    masks = [
        model.segmenter.upscale(low[i], batch.sam_sizes[i], size)
        if bool(decodable[i])
        else low.new_full((low.shape[1], *size), EMPTY_LOGIT, dtype=torch.float32)
        for i, size in enumerate(batch.mask_sizes)
    ]
    return [
        Prediction(sample.row, text, parse_answer(text), mask, bool(has_seg))
        for sample, text, mask, has_seg in zip(batch.samples, texts, masks, asked, strict=True)
    ]


def _append_seg(
    model: AuroraModel, batch: Batch, media: MediaFeatures, tokenizer: PreTrainedTokenizerBase, answers: Generation
) -> tuple[Tensor, Tensor]:
    """Hidden states [B,D] with those of failed answers read behind an appended "It is [SEG].", and their flags [B]."""
    ending = torch.tensor(tokenizer.encode(ENDING, add_special_tokens=False))
    if int((ending == model.seg_token_id).sum()) != 1:
        raise ValueError(
            f"the tokenizer writes {ENDING!r} without [SEG] (id {model.seg_token_id}): {ending.tolist()}"
        )
    failed = (~answers.has_seg).nonzero().flatten()
    rows = failed.tolist()
    packed = model.pack(
        batch, [torch.cat([answers.token_ids[i], ending]) for i in rows], [batch.prompts[i] for i in rows]
    )
    states = model.hidden_states(packed, MediaFeatures(media.video[failed], media.audio[failed]))
    hidden = answers.seg_hidden.clone()
    hidden[failed] = states[torch.arange(len(rows), device=states.device), packed.seg_positions]
    return hidden, torch.ones_like(answers.has_seg)
