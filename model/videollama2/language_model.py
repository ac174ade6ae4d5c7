"""Qwen2 from transformers, with rotary frequencies that stay float32."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from model.videollama2.config import VideoLlama2Config

ATTENTION = ("eager", "sdpa", "flash_attention_2")


class Float32RotaryEmbedding(Qwen2RotaryEmbedding):
    """Rotary embedding that survives `model.to(torch.bfloat16)`.

    The frequencies are a buffer, so a cast of the module (DeepSpeed's bf16 engine does one) would round them to 8 bits;
    at position 2000 that turns a phase by radians. They are recomputed after every move or cast.
    """

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # noqa: ANN001 (torch's own signature)
        super()._apply(fn, recurse)
        device = self.inv_freq.device
        with torch.device("cpu"):
            exact, _ = self.compute_default_rope_parameters(self.config)
        self.inv_freq = exact.to(device)
        self.original_inv_freq = exact.to(device)
        return self


def build_language_model(config: VideoLlama2Config, attention: str = "sdpa") -> Qwen2ForCausalLM:
    """Qwen2 with random weights: embeddings in, hidden states and logits out.

    Args:
        config: sizes (`config.language`).
        attention: one of `ATTENTION`; flash attention needs the flash-attn package, a GPU and half precision.

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


def reset_rotary(model: Qwen2ForCausalLM, device: torch.device | str) -> None:
    """Give the frequencies, which no checkpoint stores, their values on `device` (after a meta construction)."""
    model.model.rotary_emb.to_empty(device=device)
