"""Decoding steps of Qwen2 for G answers behind each of B prompts whose keys and values are kept, and read, once.

transformers' cache is one tensor per layer, [R,h,P+t,d]: for a group it holds the prompt G times, each step copies all
of it to append a column, and copies it again for the query heads that share a key. Here the prompt's keys and values
stay [B,h,P,d], the queries of a whole group meet them in one product, and each answer's own keys lie in a buffer of
fixed size. One softmax spans both parts, so the result is that of ordinary attention up to rounding.

On a CPU the weights are what a step reads most, and `apply_linear` reads them faster where G is 2 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP, Qwen2Model, apply_rotary_pos_emb

FEW_ROWS = range(2, 5)
"""Rows for which `apply_linear` exchanges the factors (measured for 1 to 8, widths 512 to 3,584: docs/grpo.md)."""


def apply_linear(linear: nn.Module, rows: Tensor) -> Tensor:
    """linear(rows), [R,i] -> [R,o]; a few rows of float32 on a CPU as (weight rows^T)^T.

    It is the same product, but rows weight^T with 2 to 4 rows takes a path of the BLAS that uses one thread and reads
    the weight at a fraction of the memory's speed. Adapters and other types are called as they are, and so is a weight
    that ZeRO-3 partitions: only the call of its module makes sure that it has been gathered.
    """
    slow = len(rows) in FEW_ROWS and rows.device.type == "cpu" and rows.dtype == torch.float32
    if not slow or type(linear) is not nn.Linear or hasattr(linear.weight, "ds_id"):
        return linear(rows)
    columns = linear.weight @ rows.t()
    return (columns if linear.bias is None else columns + linear.bias[:, None]).t()


class SharedCache:
    """Keys and values of B prompts and of the R = B * G answers that grow behind them.

    Args:
        decoder: whose layers are run; in eval mode.
        prompts: cache of a prefill of B prompts.
        known: bool [B,P], False at padding.
        group: G; row b * G + g is answer g of prompt b.
        longest: tokens per answer, at most.
    """

    def __init__(self, decoder: Qwen2Model, prompts: DynamicCache, known: Tensor, group: int, longest: int) -> None:
        self.decoder, self.group, self.length = decoder, group, 0
        self.prompts = [(layer.keys, layer.values) for layer in prompts.layers]
        self.padding = None if bool(known.all()) else ~known[:, None, None]  # [B,1,1,P]
        keys = self.prompts[0][0]
        shape = (len(known) * group, keys.shape[1], longest, keys.shape[3])
        self.answers = [(keys.new_zeros(shape), keys.new_zeros(shape)) for _ in self.prompts]

    def step(self, words: Tensor, positions: Tensor) -> Tensor:
        """Append one token to every answer.

        Args:
            words: [R,D] its embedding.
            positions: int64 [R].

        Returns:
            [R,D] final-norm hidden states.
        """
        hidden = words
        rotary = self.decoder.rotary_emb(hidden, positions[:, None])
        for number, layer in enumerate(self.decoder.layers):
            hidden = hidden + self._attend(number, layer, layer.input_layernorm(hidden), rotary)
            hidden = hidden + _feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))
        self.length += 1
        return self.decoder.norm(hidden)

    def _attend(self, number: int, layer: Qwen2DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """As `Qwen2Attention.forward` for one new token: [R,D] -> [R,D]."""
        attention, rows = layer.self_attn, len(hidden)
        queries, keys, values = (
            apply_linear(project, hidden).reshape(rows, -1, 1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        own_keys, own_values = self.answers[number]
        own_keys[:, :, self.length], own_values[:, :, self.length] = keys[:, :, 0], values[:, :, 0]
        own_keys, own_values = own_keys[:, :, : self.length + 1], own_values[:, :, : self.length + 1]
        shared_keys, shared_values = self.prompts[number]
        queries = queries.view(rows, keys.shape[1], -1, attention.head_dim)  # [R,h,q,d], q queries to a key
        before = self._gather(queries) @ shared_keys.transpose(2, 3)
        if self.padding is not None:
            before = before.masked_fill(self.padding, torch.finfo(before.dtype).min)
        scores = torch.cat([self._scatter(before), queries @ own_keys.transpose(2, 3)], dim=-1)
        weights = (scores * attention.scaling).softmax(-1, dtype=torch.float32).to(hidden.dtype)
        prompt = shared_keys.shape[2]
        found = self._scatter(self._gather(weights[..., :prompt]) @ shared_values) + weights[..., prompt:] @ own_values
        return apply_linear(attention.o_proj, found.reshape(rows, -1))

    def _gather(self, rows: Tensor) -> Tensor:
        """[R,h,q,n] -> [B,h,G*q,n]: a group's queries side by side."""
        return rows.unflatten(0, (-1, self.group)).transpose(1, 2).flatten(2, 3)

    def _scatter(self, groups: Tensor) -> Tensor:
        """[B,h,G*q,n] -> [R,h,q,n]"""
        return groups.unflatten(2, (self.group, -1)).transpose(1, 2).flatten(0, 1)


def _feed_forward(mlp: Qwen2MLP, hidden: Tensor) -> Tensor:
    """As `Qwen2MLP.forward`: [R,D] -> [R,D]."""
    gates = mlp.act_fn(apply_linear(mlp.gate_proj, hidden))
    return apply_linear(mlp.down_proj, gates * apply_linear(mlp.up_proj, hidden))
