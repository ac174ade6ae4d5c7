"""Answers drawn token by token: prompts prefilled once, their cache shared by a group, [SEG] states kept on the way.

A loop of our own, because three things are wanted that transformers' `generate` does not give: the prompt is read and
kept once for a whole group (`model.aurora.shared_prompt`; docs/grpo.md has the figures), the hidden state AT [SEG] is
captured in the step that reads [SEG] (the released code regenerates the full sequence for it,
LISA_sft_distill.py:256-282), and dropout and gradient checkpointing are off whatever mode the model is in (released
rollouts run in train mode, LISA_grpo.py:436-449).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from model.aurora.model import AuroraModel, evaluating
from model.aurora.sampling import Sampling
from model.aurora.shared_prompt import PromptCache
from utils.guards import check_logits
from utils.types import Batch, Generation, MediaFeatures

STOP_TOKEN = "<|im_end|>"
"""Ends an assistant turn in Qwen2's chat format."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer (any of transformers' fits)."""

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


@torch.no_grad()
def generate(
    model: AuroraModel,
    batch: Batch,
    media: MediaFeatures,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    group: int = 1,
    sampling: Sampling | None = None,
    everyone: Callable[[bool], bool] | None = None,
) -> Generation:
    """Draw `group` answers for each of the B prompts of `batch`.

    Args:
        model: the joint model, in any mode (put back afterwards).
        batch, media: the prompts, of any lengths, and the features of their clips.
        tokenizer: decodes the answers and names the stop token.
        max_new_tokens: longest answer, stop token included.
        group: answers per prompt; row b * group + g is answer g of prompt b.
        sampling: how tokens are drawn; None = the most likely ones, under the base's own repetition penalty.
        everyone: given whether this process's answers are done, says whether those of all processes are.

    Raises:
        ValueError: no new token, or no answer, is asked for.
        NonFiniteError: the logits are not finite, as in float16.
    """
    if max_new_tokens < 1 or group < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and group {group} must be at least 1")
    sampling = model.generation_defaults.greedy() if sampling is None else sampling
    stop, backbone = tokenizer.convert_tokens_to_ids(STOP_TOKEN), model.backbone
    with evaluating(model):
        packed = model.pack_without_last_token(batch)
        rows = model.embed(packed, media), packed.attention_mask
        cache = PromptCache(backbone.decoder, *rows, group, max_new_tokens + 1, packed.position_ids)
        # As in scoring, the prompt's last token is the first of each of its answers' streams.
        drawn = torch.stack([prompt[-1] for prompt in batch.prompts]).to(model.device).repeat_interleave(group)
        at_seg = torch.zeros_like(drawn, dtype=torch.bool)
        finished, has_seg, lengths = at_seg.clone(), at_seg.clone(), torch.zeros_like(drawn)
        written = drawn.new_empty(len(drawn), 0)
        seg_hidden, ended, scores = None, False, []
        while True:
            hidden = cache.append(backbone.words(drawn))
            # The state AT [SEG] exists once [SEG] has been read. The last of several counts (`query_positions`).
            seg_hidden = hidden if seg_hidden is None else torch.where(at_seg[:, None], hidden, seg_hidden)
            has_seg |= at_seg
            if ended:
                break
            logits = backbone.lm_head(hidden)
            check_logits(logits)
            log_probs = sampling.log_probs(logits, written)
            drawn = sampling.draw(log_probs)
            written = torch.cat([written, drawn[:, None]], dim=1)
            scores.append(log_probs.gather(-1, drawn[:, None])[:, 0])
            lengths += ~finished
            at_seg = (drawn == model.seg_token_id) & ~finished
            finished |= drawn == stop
            ended = bool(finished.all()) or written.shape[1] == max_new_tokens
            # ZeRO-3: a process that stopped early would leave the others waiting for its part of the next layer.
            if everyone is not None:
                ended = everyone(ended)
            elif ended and not bool(at_seg.any()):
                break  # only a [SEG] drawn last is read once more, for its state
    ids = [row[:n] for row, n in zip(written.cpu(), lengths.tolist(), strict=True)]
    return Generation(
        token_ids=ids,
        texts=[tokenizer.decode([t for t in row.tolist() if t != stop]).strip() for row in ids],
        seg_hidden=seg_hidden[has_seg],
        answer_of_query=has_seg.nonzero().flatten(),
        truncated=torch.tensor([int(row[-1]) != stop for row in ids], device=has_seg.device),
        log_probs=[row[: len(own)] for row, own in zip(torch.stack(scores, 1), ids, strict=True)],
    )
