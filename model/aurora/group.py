"""G answers about one clip read behind one prompt: exact log-probabilities and gradients at the cost of one prompt.

A plain pass reads the prompt, of 1,300 to 2,400 tokens, once per answer: G (P + C) tokens. Here it is read once and the
answers attend to its keys and values: P + G C tokens. Gradients flow back through those keys and values, so that the
result is that of the plain pass up to rounding (tests/test_grpo.py).

Both streams go through a layer together, and that pair of calls is what gradient checkpointing recomputes.
(transformers drops the cache of a layer that is checkpointed, in silence but for a log line, which is why the model's
own forward with a cache cannot be used.) Two things are saved besides: of the prompt, the last layer computes keys and
values alone, and the prompt's last token is read with the answers, so that no logit of the prompt is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model, apply_rotary_pos_emb

from utils.types import IGNORE, Batch, MediaFeatures, PackedInputs

if TYPE_CHECKING:
    from model.aurora.model import AuroraModel

Read = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(lm_head, hidden states [A,D], token ids [A]) -> log-probabilities [A] and entropies [A]."""

Rotary = tuple[Tensor, Tensor]


@dataclass
class GroupInputs:
    """B prompts and the R = B * G answers behind them; row b * G + g is answer g of prompt b."""

    prompts: PackedInputs
    """B rows without their last token, right padded."""
    token_ids: Tensor
    """int64 [R,L]: the prompt's last token, then the answer, right padded with 0. The answer's own last token is only
    there if it is [SEG]: nothing else reads its hidden state."""
    targets: Tensor
    """int64 [R,L]: the answer's token that each position predicts, IGNORE elsewhere."""
    seg_positions: Tensor
    """int64 [R]: where `token_ids` holds the answer's last [SEG], -1 without one."""
    group: int
    read: Read
    """Turns hidden states into log-probabilities inside the model's forward (ZeRO-3 gathers lm_head there alone)."""

    @property
    def has_seg(self) -> Tensor:
        """bool [R]"""
        return self.seg_positions >= 0

    @property
    def mask(self) -> Tensor:
        """bool [R,L]: positions that predict a token of an answer."""
        return self.targets != IGNORE

    def to(self, device: torch.device | str) -> GroupInputs:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return GroupInputs(**{k: x.to(device) if hasattr(x, "to") else x for k, x in moved.items()})


@dataclass
class GroupOutput:
    """What a pass over R answers gives."""

    log_probs: Tensor
    """float32 [R,L]: of `GroupInputs.targets`, 0 where there is none."""
    entropy: Tensor
    """float32 [R,L]: of the distributions they come from, without gradient, 0 where there is none."""
    seg_features: Tensor
    """[R,C] projected hidden state AT the last [SEG]; zeros without one."""
    has_seg: Tensor
    """bool [R]"""
    mask_logits: Tensor | None
    """[R,T or k,4h,4w] low-resolution mask logits; None without image embeddings."""


def pack_group(model: AuroraModel, batch: Batch, answers: Sequence[Tensor], group: int, read: Read) -> GroupInputs:
    """Lay out B prompts and B * G answers; runs no weight.

    Args:
        model: gives the media token counts, the id of [SEG] and the device.
        batch: B clips.
        answers: R x int64 [L], at least one token each, in the order of `Generation`.
        group: G.
        read: see `GroupInputs`.

    Raises:
        ValueError: another number of answers than B * G, an empty answer, or a prompt that ends in a placeholder.
    """
    prompts = [prompt.cpu() for prompt in batch.prompts]
    if len(answers) != group * len(prompts):
        raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts in groups of {group}")
    for number, prompt in enumerate(prompts):
        if len(prompt) < 2 or prompt[-1] < 0:
            raise ValueError(f"prompt {number} must end in a token of text behind at least one other")
    rows = []
    for number, answer in enumerate(x.cpu() for x in answers):
        if not len(answer):
            raise ValueError(f"answer {number} is empty")
        at = (answer == model.seg_token_id).nonzero().flatten()
        seg = int(at[-1]) + 1 if len(at) else -1
        stream = torch.cat([prompts[number // group][-1:], answer])[: max(len(answer), seg + 1)]
        rows.append((stream, answer, seg))
    longest = max(len(stream) for stream, _, _ in rows)
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full_like(token_ids, IGNORE)
    for number, (stream, answer, _) in enumerate(rows):
        token_ids[number, : len(stream)] = stream
        targets[number, : len(answer)] = answer
    heads = model.pack(batch, None, [prompt[:-1] for prompt in prompts])
    segs = torch.tensor([seg for _, _, seg in rows])
    return GroupInputs(heads, token_ids, targets, segs, group, read).to(model.device)


def group_forward(
    model: AuroraModel, packed: GroupInputs, media: MediaFeatures, frame_index: Tensor | None = None
) -> GroupOutput:
    """One differentiable pass over R answers; called by `AuroraModel.forward`.

    Args:
        packed: from `pack_group`.
        media: features of the B clips.
        frame_index: int64 [R,k] frames whose masks are decoded; None = all T.

    Raises:
        RuntimeError: the language model is in train mode, in which checkpointed layers drop the cache.
    """
    hidden = group_hidden_states(model, packed, media)
    mask = packed.mask
    log_probs, entropy = packed.read(model.backbone.language_model.lm_head, hidden[mask], packed.targets[mask])
    places = torch.zeros_like(packed.targets, dtype=log_probs.dtype)
    rows = torch.arange(len(hidden), device=hidden.device)
    at_seg = hidden[rows, packed.seg_positions.clamp(min=0)]
    seg_features = model.project(at_seg).masked_fill(~packed.has_seg[:, None], 0)
    images = media.image_embeddings
    if images is not None:
        clips = rows // packed.group
        images = images[clips] if frame_index is None else images[clips[:, None], frame_index]
    return GroupOutput(
        log_probs=places.masked_scatter(mask, log_probs),
        entropy=places.masked_scatter(mask, entropy),
        seg_features=seg_features,
        has_seg=packed.has_seg,
        mask_logits=model.decode_masks(seg_features, packed.has_seg, images),
    )


def group_hidden_states(model: AuroraModel, packed: GroupInputs, media: MediaFeatures) -> Tensor:
    """Final-norm hidden states [R,L,D] of the answers' positions."""
    decoder = model.backbone.language_model.model
    prompt = model.backbone.embed(packed.prompts, replace(media, image_embeddings=None))
    return shared_prompt_states(
        decoder, prompt, packed.prompts.attention_mask, decoder.embed_tokens(packed.token_ids), packed.group
    )


def shared_prompt_states(decoder: Qwen2Model, prompt: Tensor, known: Tensor, answers: Tensor, group: int) -> Tensor:
    """Run Qwen2's layers over B prompts and over the R = B * G answers behind them.

    Args:
        decoder: in eval mode.
        prompt: [B,P,D] embeddings, right padded.
        known: bool [B,P], False at padding.
        answers: [R,L,D] embeddings, right padded; row b * G + g stands behind prompt b.
        group: G.

    Returns:
        [R,L,D] final-norm hidden states; those of padding mean nothing.

    Raises:
        RuntimeError: the decoder is in train mode.
    """
    known = known.repeat_interleave(group, 0)  # [R,P]
    length = answers.shape[1]
    # Right padding: a valid query never sees the padding behind it, so the prompt needs the causal mask alone.
    prompt_mask = create_causal_mask(decoder.config, prompt, None, None)
    answer_mask = _answer_mask(decoder.config._attn_implementation, known, length, answers.dtype)
    prompt_rotary = decoder.rotary_emb(prompt, torch.arange(prompt.shape[1], device=prompt.device)[None])
    answer_rotary = decoder.rotary_emb(answers, known.sum(1)[:, None] + torch.arange(length, device=prompt.device))
    last = len(decoder.layers) - 1
    for number, layer in enumerate(decoder.layers):
        pair = _Pair(layer, group, prompt_mask, answer_mask, prompt_rotary, answer_rotary, number == last)
        if layer.gradient_checkpointing and torch.is_grad_enabled():
            prompt, answers = checkpoint(pair, prompt, answers, use_reentrant=False, preserve_rng_state=False)
        else:
            prompt, answers = pair(prompt, answers)
    return decoder.norm(answers)


@dataclass(frozen=True)
class _Pair:
    """One layer applied to the prompt [B,P,D] and to the answers [R,L,D] behind it."""

    layer: Qwen2DecoderLayer
    group: int
    prompt_mask: Tensor | None
    answer_mask: Tensor
    prompt_rotary: Rotary
    answer_rotary: Rotary
    last: bool

    def __call__(self, prompt: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer.training:  # checked at recomputation too
            raise RuntimeError("a group is scored in eval mode; call model.eval() and stay there until after backward")
        kept = _Kept()
        if self.last:
            kept.keys, kept.values = self._keys_values(prompt)
        else:
            prompt = self._run(prompt, self.prompt_mask, self.prompt_rotary, kept)
        behind = _Behind(kept.keys, kept.values, self.group)
        return prompt, self._run(answers, self.answer_mask, self.answer_rotary, behind)

    def _run(self, hidden: Tensor, mask: Tensor | None, rotary: Rotary, cache: _Kept | _Behind) -> Tensor:
        return self.layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)

    def _keys_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """As `Qwen2Attention.forward` makes them, [B,heads,P,d]."""
        attention, hidden = self.layer.self_attn, self.layer.input_layernorm(prompt)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        keys, values = (project(hidden).view(shape).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
        _, keys = apply_rotary_pos_emb(keys, keys, *self.prompt_rotary)
        return keys, values


class _Kept:
    """A cache of one layer that only remembers what it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _Behind:
    """A cache of one layer that puts the prompt's keys and values before those of each of its G answers."""

    def __init__(self, keys: Tensor, values: Tensor, group: int) -> None:
        self.keys, self.values, self.group = keys, values, group

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return self._join(self.keys, keys), self._join(self.values, values)

    def _join(self, prompt: Tensor, answers: Tensor) -> Tensor:
        """[B,h,P,d], [R,h,L,d] -> [R,h,P+L,d] in one copy."""
        shared = prompt[:, None].expand(-1, self.group, -1, -1, -1)
        return torch.cat([shared, answers.unflatten(0, (-1, self.group))], dim=3).flatten(0, 1)


def _answer_mask(attention: str, known: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What the answers see: valid prompt positions `known` [R,P] and, causally, themselves; as the kernel wants it."""
    if attention == "flash_attention_2":  # causal by itself, aligned at the end of the unpadded keys
        return torch.cat([known, known.new_ones(len(known), length)], dim=1)
    before = known[:, None, None].expand(-1, 1, length, -1)
    own = torch.ones(length, length, dtype=torch.bool, device=known.device).tril()
    seen = torch.cat([before, own.expand(len(known), 1, -1, -1)], dim=-1)  # [R,1,L,P+L]
    if known.is_meta or bool(known.all()):  # a plan's rows have no padding
        seen = seen[:1]
    if attention == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
