"""Answers drawn token by token: prompts prefilled once, their cache shared by a group, [SEG] states kept on the way.

A loop of our own, because three things are wanted that transformers' `generate` does not give: the prompt is read and
kept once for a whole group (`model.aurora.shared_prompt`; docs/grpo.md has the figures), the hidden state AT [SEG] is
captured in the step that reads [SEG] (the released code regenerates the full sequence for it,
LISA_sft_distill.py:256-282), and dropout and gradient checkpointing are off whatever mode the model is in (released
rollouts run in train mode, LISA_grpo.py:436-449).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from model.aurora.model import AuroraModel, evaluating
from model.aurora.shared_prompt import PromptCache
from utils.guards import check_logits
from utils.types import Batch, Generation, MediaFeatures

STOP_TOKEN = "<|im_end|>"
"""Ends an assistant turn in Qwen2's chat format."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer (any of transformers' fits)."""

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 = the most likely token."""
    top_p: float = 1.0
    """Mass of the most likely tokens that is drawn from; 1 = all."""
    generator: torch.Generator | None = None
    """Source of randomness, on any device; None = torch's own."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")

    def draw(self, log_probs: Tensor) -> Tensor:
        """[R,V] log-probabilities -> [R] token ids."""
        if self.temperature == 0:
            return log_probs.argmax(-1)
        probabilities = log_probs.exp()
        if self.generator is not None:
            probabilities = probabilities.to(self.generator.device)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0].to(log_probs.device)


def sampling_log_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities of the distribution that is sampled from.

    softmax(logits / temperature); then, below top_p = 1, cut to the smallest set of most likely tokens whose mass
    reaches top_p and normalised again. Greedy choice (temperature 0) reports the unscaled softmax.

    Args:
        logits: [...,V] of any float type.

    Returns:
        float32 [...,V], -inf outside the set.
    """
    log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p == 1:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    mass_before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.empty_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return log_probs.masked_fill(outside, float("-inf")).log_softmax(-1)


@torch.no_grad()
def generate(
    model: AuroraModel,
    batch: Batch,
    media: MediaFeatures,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    group: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    everyone: Callable[[bool], bool] | None = None,
) -> Generation:
    """Draw `group` answers for each of the B prompts of `batch`.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch: gives the prompts, of any lengths.
        media: features of the B clips; only the words' part is read.
        tokenizer: decodes the answers and names the stop token.
        max_new_tokens: longest answer, stop token included.
        group: answers per prompt; row b * group + g is answer g of prompt b.
        temperature, top_p, generator: see `Sampling`.
        everyone: given whether this process's answers are done, says whether those of all processes are. With it every
            process takes the same number of steps, which partitioned weights (ZeRO-3) need: a process that stopped
            early would leave the others waiting for its part of the next layer.

    Returns:
        Generation of B * group answers.

    Raises:
        ValueError: a setting outside its range.
        NonFiniteError: the logits are not finite, as in float16.
    """
    if max_new_tokens < 1 or group < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and group {group} must be at least 1")
    sampling = Sampling(temperature, top_p, generator)
    with evaluating(model):
        return _draw_answers(model, batch, media, tokenizer, max_new_tokens, group, sampling, everyone)


def _draw_answers(
    model: AuroraModel,
    batch: Batch,
    media: MediaFeatures,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    group: int,
    sampling: Sampling,
    everyone: Callable[[bool], bool] | None,
) -> Generation:
    """The loop: read one token of every answer, keep the state at [SEG], draw the next."""
    language_model, stop = model.backbone.language_model, tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    packed = model.pack_without_last_token(batch)
    embeddings = model.backbone.embed(packed, replace(media, image_embeddings=None))
    cache = PromptCache(language_model.model, embeddings, packed.attention_mask, group, max_new_tokens + 1)
    # As in scoring, the prompt's last token is the first of each of its answers' streams.
    last = torch.stack([prompt[-1] for prompt in batch.prompts]).to(model.device).repeat_interleave(group)
    drawn = last
    at_seg = torch.zeros_like(last, dtype=torch.bool)
    finished, has_seg, lengths = at_seg.clone(), at_seg.clone(), torch.zeros_like(last)
    seg_hidden, ended = None, False
    tokens, scores = [], []
    while True:
        hidden = cache.append(language_model.get_input_embeddings()(drawn))
        # The state AT [SEG] exists once [SEG] has been read. The last of several counts.
        seg_hidden = torch.zeros_like(hidden) if seg_hidden is None else seg_hidden
        seg_hidden = torch.where(at_seg[:, None], hidden, seg_hidden)
        has_seg |= at_seg
        if ended:
            break
        logits = language_model.lm_head(hidden)
        check_logits(logits)
        log_probs = sampling_log_probs(logits, sampling.temperature, sampling.top_p)
        drawn = sampling.draw(log_probs)
        tokens.append(drawn)
        scores.append(log_probs.gather(-1, drawn[:, None])[:, 0])
        lengths += ~finished
        at_seg = (drawn == model.seg_token_id) & ~finished
        finished |= drawn == stop
        ended = bool(finished.all()) or len(tokens) == max_new_tokens
        if everyone is not None:
            ended = everyone(ended)
        elif ended and not bool(at_seg.any()):
            break  # only a [SEG] drawn last is read once more, for its state
    return _collect(tokenizer, stop, torch.stack(tokens, 1), torch.stack(scores, 1), lengths, seg_hidden, has_seg)


def _collect(
    tokenizer: Tokenizer,
    stop: int,
    tokens: Tensor,
    scores: Tensor,
    lengths: Tensor,
    seg_hidden: Tensor,
    has_seg: Tensor,
) -> Generation:
    """Cut the [R,L] tokens and log-probabilities to each row's length and decode them."""
    counts = lengths.tolist()
    ids = [row[:n] for row, n in zip(tokens.cpu(), counts, strict=True)]
    texts = [tokenizer.decode([t for t in row.tolist() if t != stop], skip_special_tokens=False).strip() for row in ids]
    return Generation(
        token_ids=ids,
        texts=texts,
        seg_hidden=seg_hidden,
        has_seg=has_seg,
        truncated=torch.tensor([int(row[-1]) != stop for row in ids], device=has_seg.device),
        log_probs=[row[:n] for row, n in zip(scores, counts, strict=True)],
    )
