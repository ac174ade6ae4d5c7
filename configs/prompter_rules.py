"""Rules of `model.prompter`: what goes with a model whose masks are not asked for by a written [SEG]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from configs.rule import BrokenRule

if TYPE_CHECKING:
    from configs.schema import RunConfig


def prompter_rules(c: RunConfig) -> Iterator[BrokenRule]:
    """Every combination with `model.prompter` that cannot be."""
    m = c.model
    if m.text_encoder is not None and m.prompter != "text_encoder":
        yield BrokenRule(
            ("model.text_encoder", "model.prompter"),
            "the text encoder would be loaded and used for nothing",
            "set model.prompter to text_encoder, or model.text_encoder to null",
        )
    if m.learnable_tokens != 1 and m.prompter != "learnable_tokens":
        yield BrokenRule(
            ("model.learnable_tokens", "model.prompter"),
            "no learnable tokens are appended",
            "set model.prompter to learnable_tokens, or remove model.learnable_tokens",
        )
    if m.prompter == "seg_token":
        return
    if c.stage not in ("sft", "eval"):
        yield BrokenRule(
            ("model.prompter", "stage"),
            f"stage {c.stage} needs a written [SEG]",
            "set stage to sft, or model.prompter to seg_token",
        )
    if c.loss.distill > 0:
        yield BrokenRule(
            ("model.prompter", "loss.distill"),
            "the teacher's features are those of a [SEG]",
            "set loss.distill to 0, or model.prompter to seg_token",
        )
    if c.trainable.seg_rows_only:
        yield BrokenRule(
            ("model.prompter", "trainable.seg_rows_only"), "no [SEG] is written or read", "set seg_rows_only to false"
        )
    if c.stage == "sft" and c.trainable.seg_head and c.loss.bce + c.loss.dice == 0:
        yield BrokenRule(
            ("trainable.seg_head", "loss.bce", "loss.dice"),
            "without a mask loss the projection and the learnable tokens get no gradient",
            "set trainable.seg_head to false, or loss.bce or loss.dice above 0",
        )
    if m.prompter == "text_encoder" and c.stage == "sft":
        yield from _text_rules(c)


def _text_rules(c: RunConfig) -> Iterator[BrokenRule]:
    if c.loss.ce > 0:
        yield BrokenRule(("model.prompter", "loss.ce"), "a text encoder writes no answer", "set loss.ce to 0")
    if c.data.answer != "plain":
        yield BrokenRule(
            ("model.prompter", "data.answer"), "a text encoder reads no answer", "set data.answer to plain"
        )
