"""Qwen2 from transformers, with rotary frequencies that stay float32."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from model.backbones.videollama2.config import VideoLlama2Config

ATTENTION = ("eager", "sdpa")


class Float32RotaryEmbedding(nn.Module):
    """Rotary embedding whose frequencies stay float32 when the model is cast to bfloat16.

    In transformers they are a buffer, so a cast of the module (DeepSpeed's bf16 engine does one) rounds them to 8 bits;
    at position 2000 that turns a phase by radians. Here they are a plain tensor, which no cast or move of a module
    reaches.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        with torch.device("cpu"):  # also where the model around it is made on the meta device
            self.frequencies, self.scaling = Qwen2RotaryEmbedding.compute_default_rope_parameters(config)

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B,S,d] of the rotation at `position_ids` [B,S], in the type of `hidden`."""
        phases = position_ids[..., None].float() * self.frequencies.to(hidden.device)
        phases = torch.cat((phases, phases), dim=-1)
        return (phases.cos() * self.scaling).to(hidden.dtype), (phases.sin() * self.scaling).to(hidden.dtype)


def build_language_model(config: VideoLlama2Config, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """Qwen2 with random weights: embeddings in, hidden states and logits out.

    Args:
        config: sizes (`config.language`).
        attention: one of `ATTENTION`; `AuroraModel` puts its own in the place.

    Raises:
        ValueError: for an unknown attention.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention = {attention!r}: must be one of {', '.join(ATTENTION)}")
    sizes = asdict(config.language)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    qwen = Qwen2Config(**sizes, rope_parameters=rope, tie_word_embeddings=False, attn_implementation=attention)
    model = Qwen2ForCausalLM(qwen)
    model.model.rotary_emb = Float32RotaryEmbedding(qwen)
    return model
