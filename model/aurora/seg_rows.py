"""Training one row of a vocabulary matrix: the lean alternative to training 1.09 G values for one new token.

The published code trains embed_tokens and lm_head whole (train_ds.py:276-284) because [SEG] is the only token without a
trained row. Here the matrices stay frozen, and the [SEG] row of each is a parameter of its own, `seg_row`, which takes
the place of the stored row. All names of the base stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM


class SegRowEmbedding(nn.Embedding):
    """An embedding whose row of [SEG] is `seg_row` [D]; `weight` is shared with the embedding it replaces."""

    def __init__(self, base: nn.Embedding, token_id: int) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight
        self.token_id = token_id
        self.seg_row = nn.Parameter(base.weight[token_id].detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        words = F.embedding(input, self.weight)
        return torch.where((input == self.token_id)[..., None], self.seg_row, words)


class SegRowLinear(nn.Linear):
    """An lm_head whose row of [SEG] is `seg_row` [D]; `weight` is shared with the layer it replaces."""

    def __init__(self, base: nn.Linear, token_id: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.token_id = token_id
        self.seg_row = nn.Parameter(base.weight[token_id].detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        logits = F.linear(input, self.weight)
        own = F.linear(input, self.seg_row[None])  # [...,1]
        return torch.cat([logits[..., : self.token_id], own, logits[..., self.token_id + 1 :]], dim=-1)


def train_seg_rows(language_model: Qwen2ForCausalLM, token_id: int) -> None:
    """Replace embed_tokens and lm_head by the two layers above, in place; a second call changes nothing."""
    embedding, head = language_model.model.embed_tokens, language_model.lm_head
    if not isinstance(embedding, SegRowEmbedding):
        language_model.model.embed_tokens = SegRowEmbedding(embedding, token_id)
        language_model.lm_head = SegRowLinear(head, token_id)
