"""The only place with prompt text: a reference -> ids with the media placeholder, an answer -> target ids.

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n<video>\\nThe reference is: {reference} Please segment ... images.<|im_end|>\\n
    <|im_start|>assistant\\n            {answer}<|im_end|>

Qwen2's chat template, tokenised in pieces as the released code does (VideoLLaMA2 mm_utils.py,
tokenizer_multimodal_token): the negative placeholder id stands between the pieces before and after `<video>`. One
placeholder stands for a clip with sound: it becomes [video tokens, audio tokens]. `UnmarkedPrompts` and
`ReferencePrompts` serve models that do not write [SEG] (`model.prompter`; paper tables 2 and 7).

Control ids are set by this module alone. Text from data files goes through a tokenizer that knows no added token: a
reference or a reasoning that spells "[SEG]", "<video>" or "<|im_start|>" is read as those characters, steering nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from configs.schema import ModelConfig
from utils.errors import DataError
from utils.types import VIDEO_PLACEHOLDER

SystemPrompt = Literal["llama2", "qwen2", "none"]
AnswerKind = Literal["reasoning", "conclusion", "class", "plain"]
NEED_REASONING: tuple[AnswerKind, ...] = ("reasoning", "conclusion")
"""Answers that are made from a chain of thought."""

SYSTEM_PROMPTS: dict[str, str | None] = {
    # AURORA utils/sem_seg_dataset.py:513-519, two spaces and one line break included: LLaMA-2's safety text with its
    # <<SYS>> marks, put in Qwen2's system turn. The base checkpoint was tuned with Qwen2's own default.
    "llama2": (
        "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
        "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
        "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n"
        "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
        "something not correct. If you don't know the answer to a question, please don't share false information.\n"
        "<</SYS>>"
    ),
    "qwen2": "You are a helpful assistant.",
    "none": None,
}
USER_TEXT = "\nThe reference is: {reference} Please segment the corresponding object in the images."
"""What follows `<video>` in the user turn (AURORA utils/sem_seg_dataset.py:511)."""
S4_REFERENCE = "The sounding object"
"""Generic reference for benchmarks without expressions (AVSBench S4)."""

_IM_START, _IM_END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def load_tokenizer(folder: str | Path, seg_token: str = "[SEG]") -> tuple[PreTrainedTokenizerBase, int]:
    """Qwen2's tokenizer from a local folder, with the segmentation token added if it is absent.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt. Nothing is ever downloaded.
        seg_token: the token whose hidden state prompts SAM (paper section 3.1).

    Returns:
        The tokenizer and the id of `seg_token` (151646 on the released base).

    Raises:
        DataError: no tokenizer there, or Qwen2's chat tokens are not single tokens of it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise DataError(f"{folder}: no tokenizer.json and no vocab.json. Remedy: name the folder of the base model.")
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True)
    vocabulary = tokenizer.get_vocab()
    control = (_IM_START, _IM_END, _END_OF_TEXT)
    missing = [t for t in control if t not in vocabulary or tokenizer.encode(t) != [vocabulary[t]]]
    if missing:
        raise DataError(
            f"{folder}: {', '.join(missing)} is no single token; the chat template needs Qwen2's control tokens. "
            "Remedy: use the tokenizer shipped with the base model."
        )
    if seg_token not in vocabulary:
        # not special: decoding without special tokens keeps it, so answers are printed with their [SEG]
        tokenizer.add_tokens([AddedToken(seg_token, normalized=False, special=False)])
    seg_id = tokenizer.convert_tokens_to_ids(seg_token)
    if tokenizer.encode(seg_token) != [seg_id]:
        raise DataError(f"{folder}: {seg_token} is no single token. Remedy: choose another model.seg_token.")
    return tokenizer, seg_id


class Prompts:
    """Writes prompts and answers with one tokenizer and one system prompt.

    Args:
        tokenizer: from `load_tokenizer`.
        seg_id: id of the segmentation token.
        system_prompt: name in SYSTEM_PROMPTS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seg_id: int, system_prompt: SystemPrompt = "llama2") -> None:
        if system_prompt not in SYSTEM_PROMPTS:
            raise ValueError(f"system_prompt = {system_prompt!r}: must be one of {', '.join(SYSTEM_PROMPTS)}.")
        self.seg_id = seg_id
        self._seg_token = tokenizer.convert_ids_to_tokens(seg_id)
        self._start, self._end = tokenizer.convert_tokens_to_ids([_IM_START, _IM_END])
        self._plain = _without_added_tokens(tokenizer)
        for token, control_id in ((self._seg_token, seg_id), (_IM_START, self._start), (_IM_END, self._end)):
            if control_id in self._text(token):
                raise DataError(
                    f"tokenizer: {token} is an ordinary word of it, so data text could spell it. "
                    "Remedy: train the tokenizer without control tokens in its text."
                )
        system = SYSTEM_PROMPTS[system_prompt]
        head = [] if system is None else [self._start, *self._text(f"system\n{system}"), self._end, *self._text("\n")]
        self._head = [*head, self._start, *self._text("user\n"), VIDEO_PLACEHOLDER]
        self._tail = [self._end, *self._text("\n"), self._start, *self._text("assistant\n")]

    def prompt_ids(self, reference: str) -> Tensor:
        """int64 [L]: the chat up to and including the assistant header, with one VIDEO_PLACEHOLDER.

        Args:
            reference: the referring expression, without outer spaces.
        """
        return torch.tensor([*self._head, *self._text(USER_TEXT.format(reference=reference)), *self._tail])

    def answer_ids(self, kind: AnswerKind, class_name: str, reasoning: str | None = None) -> Tensor:
        """int64 [L]: a target answer with its <|im_end|>.

        Args:
            kind: "reasoning" (paper section 3.1), "conclusion" (our choice, for short answers: the last two sentences
                of the reasoning, which restate the reference and name the target), "class" (what the released
                distillation teacher reads, LISA_ref_distill.py:210) or "plain" (the paper's teacher, section 3.1).
            class_name: name for kind "class".
            reasoning: chain of thought for the first two kinds, without the ending.

        Raises:
            ValueError: a kind of NEED_REASONING without a reasoning, or an unknown kind.
        """
        before = self._before_seg(kind, class_name, reasoning)
        return torch.tensor([*self._text(before), self.seg_id, *self._text("."), self._end])

    def answer_start(self, reasoning: str, character: int) -> int:
        """Number of the first token of `answer_ids("reasoning", ...)` that holds text from `character` on.

        Args:
            reasoning: chain of thought, without the ending.
            character: position in it, 0..len(reasoning); 0 gives 0.
        """
        if character <= 0:
            return 0
        offsets = self._plain.encode(f"{reasoning} It is ", add_special_tokens=False).offsets
        return next(i for i, (_, end) in enumerate(offsets) if end > character)

    def answer_text(self, kind: AnswerKind, class_name: str, reasoning: str | None = None) -> str:
        """The same answer as text, without <|im_end|>."""
        return f"{self._before_seg(kind, class_name, reasoning)}{self._seg_token}."

    def _before_seg(self, kind: str, class_name: str, reasoning: str | None) -> str:
        if kind == "plain":
            return "It is "
        if kind == "class":
            return f"It is {class_name} "
        if kind not in NEED_REASONING:
            kinds = ", ".join(repr(known) for known in get_args(AnswerKind))
            raise ValueError(f"answer = {kind!r}: must be one of {kinds}. Remedy: set data.answer.")
        if not reasoning:
            raise ValueError(f"answer {kind!r} without a reasoning. Remedy: give a CoT file, or another data.answer.")
        return f"{reasoning if kind == 'reasoning' else conclusion(reasoning)} It is "

    def _text(self, text: str) -> list[int]:
        """Ids of plain text: no control token can come out, whatever the text spells."""
        return self._plain.encode(text, add_special_tokens=False).ids


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
    """Prompts that are the reference alone, for a text encoder; nothing reads the answers.

    Args:
        tokenizer, seg_id, system_prompt: as for `Prompts`.
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
        self._encode = encode or self._text

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
    """The prompts that `model.prompter` needs, with the tokenizer of the base."""
    if config.prompter == "learnable_tokens":
        return UnmarkedPrompts(tokenizer, seg_id, config.system_prompt)
    if config.prompter == "text_encoder":
        encode = None if config.text_encoder is None else ClipWords(config.text_encoder)
        return ReferencePrompts(tokenizer, seg_id, config.system_prompt, encode)
    return Prompts(tokenizer, seg_id, config.system_prompt)


def conclusion(reasoning: str) -> str:
    """The last two sentences of a chain of thought: steps three and four of the paper's format (section 3.1)."""
    return " ".join(re.split(r"(?<=[.!?])\s+", reasoning.strip())[-2:])


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The byte-level BPE alone. (`split_special_tokens` would still match [SEG], which is added but not special.)"""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(added_tokens=[], truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(state))
