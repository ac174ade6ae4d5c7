"""A prompt that is read once for G answers, in scoring and in sampling, through the decoder's own forward.

A prompt has 1,300 to 2,400 tokens, most of them video and sound; G full copies cost G (P + C) tokens where P + G C are
enough. Both passes use one attention function, registered with transformers under the name `ATTENTION`. It is ordinary
attention unless the caller of a decoder's forward passes the keyword `shared_prompt`, which transformers hands down to
it layer by layer. So LoRA, gradient checkpointing, ZeRO-3's hooks and any decoder of transformers work as they are, and
no layer's inside is repeated here.

    scoring    `score_answers`: one row per clip, [prompt | answer 1 | ... | answer G]. Every answer sees the prompt and
               itself. Gradients flow through the prompt's keys and values: the result is that of G full copies up to
               rounding, in values and gradients (tests/test_shared_prompt.py).
    sampling   `PromptCache`: the prompt's keys and values are kept once, [B,h,P,d], and never expanded; each step reads
               one new token of each answer.

B clips, G answers each, R = B * G; P prompt tokens, L tokens of an answer, h heads, hk heads of keys, d their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

ATTENTION = "shared_prompt"
"""Name of the attention function: `attn_implementation` of every decoder of the project."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompt: PackedAnswers | PromptCache | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [B,h,S,d], [B,hk,S,d] -> [B,S,h,d]; ordinary without `shared_prompt`."""
    if shared_prompt is None:
        return _ordinary(module, query, key, value, attention_mask, **options)
    return shared_prompt.attend(module, query, key, value, **options), None


_ordinary = AttentionInterface()["sdpa"]
AttentionInterface.register(ATTENTION, shared_prompt_attention)
# Without a mask function of the same name transformers would pass no mask at all, and padding would be seen.
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def score_answers(
    decoder: PreTrainedModel, prompts: Tensor, known: Tensor, answers: Tensor, group: int,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Final-norm hidden states [R,L,D] of R answers behind B prompts, each prompt read once.

    Args:
        decoder: a causal decoder of transformers whose `attn_implementation` is `ATTENTION`, in eval mode.
        prompts, known: [B,P,D] embeddings, right padded; bool [B,P], False at padding.
        answers, group: [R,L,D] embeddings, right padded; row b * G + g stands behind prompt b.
        positions: int64 [B,P], or [3,B,P] for a decoder with three position rows; None = 0..P-1.

    Raises:
        RuntimeError: the decoder is in train mode, in which dropout would make the first ratio differ from 1.
    """
    if decoder.training:
        raise RuntimeError("a group is scored in eval mode; call model.eval() and stay there until after backward")
    clips, length = len(prompts), answers.shape[1]
    packed = PackedAnswers.of(known, length, group)
    positions, following = _positions(known, positions)
    # Every answer continues the prompt's positions, as if it were the only one.
    behind = following + torch.arange(length, device=prompts.device).repeat(group)  # [...,B,G*L]
    row = torch.cat([prompts, answers.reshape(clips, group * length, -1)], dim=1)
    with _checkpointed_in_eval_mode(decoder):
        hidden = _read(decoder, row, packed.mask, torch.cat([positions, behind], dim=-1), packed)
    return hidden[:, known.shape[1] :].reshape(clips * group, length, -1)


@dataclass(frozen=True)
class PackedAnswers:
    """Attention of rows [prompt | answer 1 | ... | answer G]."""

    prompt: int  # P
    group: int  # G
    mask: Tensor
    """bool [R or 1,1,L,P+L]: what the tokens of an answer see, of the prompt and of themselves. It is also what the
    decoder is given as its mask, since a 4-D mask passes through every decoder of transformers untouched."""

    @classmethod
    def of(cls, known: Tensor, length: int, group: int) -> PackedAnswers:
        """For prompts of `known` positions, bool [B,P], and answers of `length` tokens."""
        # Without padding all rows see the same; one mask is then broadcast.
        rows = known[:1] if bool(known.all()) else known.repeat_interleave(group, 0)
        before = rows[:, None, None].expand(-1, 1, length, -1)
        own = torch.ones(length, length, dtype=torch.bool, device=known.device).tril()
        return cls(known.shape[1], group, torch.cat([before, own.expand(len(rows), 1, -1, -1)], dim=-1))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: object
    ) -> Tensor:
        """[B,h,P+G*L,d], [B,hk,P+G*L,d] -> [B,P+G*L,h,d]"""
        # A valid query never sees the padding behind it, so the prompt needs the causal mask alone.
        first = (x[:, :, : self.prompt] for x in (query, key, value))
        prompt, _ = _ordinary(module, *first, None, scaling=scaling)
        queries = query[:, :, self.prompt :].unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1)  # [R,h,L,d]
        keys, values = self._behind_prompt(key), self._behind_prompt(value)
        # On a CPU the kernel shares keys among heads by itself; on a GPU one that takes a mask wants a key per query.
        shares = query.device.type == "cpu"
        if not shares:
            heads = query.shape[1] // key.shape[1]
            keys, values = keys.repeat_interleave(heads, 1), values.repeat_interleave(heads, 1)
        answers = scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.mask, scale=scaling, enable_gqa=shares
        )
        answers = answers.unflatten(0, (-1, self.group)).permute(0, 1, 3, 2, 4).flatten(1, 2)  # [B,G*L,h,d]
        return torch.cat([prompt, answers], dim=1)

    def _behind_prompt(self, row: Tensor) -> Tensor:
        """[B,hk,P+G*L,d] -> [R,hk,P+L,d]: the prompt's part before that of each of its answers, in one copy."""
        prompt, answers = row[:, :, : self.prompt], row[:, :, self.prompt :]
        shared = prompt[:, None].expand(-1, self.group, -1, -1, -1)
        return torch.cat([shared, answers.unflatten(2, (self.group, -1)).transpose(1, 2)], dim=3).flatten(0, 1)


class PromptCache:
    """Keys and values of B prompts, kept once, and of the R answers that grow behind them token by token.

    transformers' own cache would hold the prompt G times, and copy all of it at every step to append a column. Here the
    queries of a group meet its prompt's keys in one product, and one softmax spans prompt and answer, so that the
    result is that of ordinary attention up to rounding.

    Args:
        decoder, prompts, known, group, positions: as for `score_answers`; the prompts are read at once.
        longest: tokens of an answer, at most.
    """

    def __init__(
        self, decoder: PreTrainedModel, prompts: Tensor, known: Tensor, group: int, longest: int,
        positions: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.group, self.longest = decoder, group, longest
        self.hidden_keys = None if bool(known.all()) else ~known[:, None, None]  # [B,1,1,P]
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [B,hk,P,d] twice
        self.answers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [B,hk,G,longest,d] twice
        self.length = 0
        positions, self.next_position = _positions(known, positions)  # the second [...,B,1]
        # A valid query never sees the padding behind it, so the prompt needs the causal mask alone.
        self._run(prompts, positions)

    def append(self, words: Tensor) -> Tensor:
        """Read one more token of every answer: its embeddings [R,D] -> final-norm hidden states [R,D] there."""
        positions = self.next_position.expand(*self.next_position.shape[:-1], self.group)
        hidden = self._run(words.unflatten(0, (-1, self.group)), positions)
        self.length += 1
        self.next_position = self.next_position + 1
        return hidden.flatten(0, 1)

    def _run(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        # The 4-D mask is never read: it keeps transformers from making one of its own.
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
        return _read(self.decoder, embeddings, unread, positions, self)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: object
    ) -> Tensor:
        """First the prompt, [B,h,P,d] -> [B,P,h,d]; then a token of each answer, [B,h,G,d] -> [B,G,h,d]."""
        layer = module.layer_idx
        if layer not in self.prompts:
            self.prompts[layer] = key, value
            room = key.new_zeros(*key.shape[:2], self.group, self.longest, key.shape[3])
            self.answers[layer] = room, torch.zeros_like(room)
            return _ordinary(module, query, key, value, None, scaling=scaling)[0]
        keys, values = self.answers[layer]
        keys[:, :, :, self.length], values[:, :, :, self.length] = key, value
        keys, values = keys[:, :, :, : self.length + 1], values[:, :, :, : self.length + 1]
        prompt_keys, prompt_values = self.prompts[layer]
        prompt = prompt_keys.shape[2]
        # [B,h,G,d] -> [B,hk,G,q,d]: the q query heads that share a head of keys lie side by side.
        queries = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)
        before = queries.flatten(2, 3) @ prompt_keys.transpose(2, 3)  # [B,hk,G*q,P]
        if self.hidden_keys is not None:
            before = before.masked_fill(self.hidden_keys, torch.finfo(before.dtype).min)
        scores = torch.cat([before.unflatten(2, (self.group, -1)), queries @ keys.transpose(3, 4)], dim=-1)
        weights = (scores * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
        found = (weights[..., :prompt].flatten(2, 3) @ prompt_values).unflatten(2, (self.group, -1))
        found = found + weights[..., prompt:] @ values  # [B,hk,G,q,d]
        return found.transpose(1, 2).flatten(2, 3)


def _read(
    decoder: PreTrainedModel, rows: Tensor, mask: Tensor, positions: Tensor, shared: PackedAnswers | PromptCache
) -> Tensor:
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    return decoder(inputs_embeds=rows, shared_prompt=shared, **options).last_hidden_state


def _positions(known: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions [...,B,P] of prompts, and [...,B,1] the position behind each."""
    if positions is None:
        positions = torch.arange(known.shape[1], device=known.device).expand(len(known), -1)
    # Behind the last token, which need not have the highest position: three rows of them let a video outlast the sound.
    last = known.sum(-1, keepdim=True) - 1
    return positions, positions.gather(-1, last.expand(*positions.shape[:-1], 1)) + 1


@contextmanager
def _checkpointed_in_eval_mode(decoder: PreTrainedModel) -> Iterator[None]:
    """Let the layers be recomputed in backward though nothing trains with dropout.

    transformers checkpoints a layer only where the layer itself is in train mode; dropout is decided by the modules
    inside it, which stay in eval mode.
    """
    for layer in decoder.layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in decoder.layers:
            layer.training = False
