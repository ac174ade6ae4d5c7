"""Prompts of models that do not write [SEG] (`model.prompter`; paper tables 2 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from configs.schema import ModelConfig
from dataset.prompt import AnswerKind, Prompts, SystemPrompt
from utils.errors import DataError


class UnmarkedPrompts(Prompts):
    """Answers without "It is [SEG].": the vocabulary stays as it is, and what prompts SAM is appended by the model."""

    def answer_ids(self, kind: AnswerKind, class_name: str, reasoning: str | None = None) -> Tensor:
        """int64 [L]: the answer with its <|im_end|>; kind plain is <|im_end|> alone. Errors as in `Prompts`."""
        return torch.tensor([*self._text(self.answer_text(kind, class_name, reasoning)), self._end])

    def answer_text(self, kind: AnswerKind, class_name: str, reasoning: str | None = None) -> str:
        """The same as text: the reasoning, "It is {class}." or nothing."""
        before = self._before_seg(kind, class_name, reasoning)
        return f"It is {class_name}." if kind == "class" else before.removesuffix("It is ").rstrip()


class ReferencePrompts(Prompts):
    """Prompts that are the reference alone, for a text encoder.

    Args:
        tokenizer, seg_id, system_prompt: as for `Prompts`, for the answers, which nothing reads.
        encode: reference -> ids of the text encoder; None = the language model's own words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seg_id: int,
        system_prompt: SystemPrompt,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        super().__init__(tokenizer, seg_id, system_prompt)
        self._encode = self._text if encode is None else encode

    def prompt_ids(self, reference: str) -> Tensor:
        """int64 [L]: the reference's ids."""
        return torch.tensor(self._encode(reference))


class ClipWords:
    """CLIP's tokenizer from a local folder: a text -> ids between its start and end tokens.

    Args:
        folder: `model.text_encoder`.

    Raises:
        DataError: no tokenizer there.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no CLIP tokenizer ({error}). Remedy: set model.text_encoder.") from error
        if len(self._tokenizer) < 3:
            raise DataError(f"{folder}: a CLIP tokenizer without words. Remedy: put vocab.json and merges.txt there.")

    def __call__(self, text: str) -> list[int]:
        """Ids, cut to CLIP's 77 positions with the end token kept."""
        longest = min(self._tokenizer.model_max_length, 77)
        return self._tokenizer(text, truncation=True, max_length=longest)["input_ids"]


def build_prompts(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seg_id: int) -> Prompts:
    """The prompts that `model.prompter` needs.

    Args:
        config: the section `model`.
        tokenizer: of the base.
        seg_id: id of the segmentation token.
    """
    if config.prompter == "learnable_tokens":
        return UnmarkedPrompts(tokenizer, seg_id, config.system_prompt)
    if config.prompter == "text_encoder":
        encode = None if config.text_encoder is None else ClipWords(config.text_encoder)
        return ReferencePrompts(tokenizer, seg_id, config.system_prompt, encode)
    return Prompts(tokenizer, seg_id, config.system_prompt)
