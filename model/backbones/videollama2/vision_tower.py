"""SigLIP as VideoLLaMA2 uses it: the patch features of an inner layer.

The released tower takes `hidden_states[-2]` of the whole model (encoder.py:126-132). The same tensor is the output of
the last-but-one encoder layer, so later layers, post_layernorm and the pooling head are not run here. They stay as
parameters because the released checkpoint stores them and a saved one must hold the same names.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from model.backbones.videollama2.config import VideoLlama2Config


class VisionTower(nn.Module):
    """Frames to patch features.

    Args:
        config: sizes; `select_layer` chooses the hidden state.
        attention: "eager" or "sdpa" (as transformers names them).
    """

    def __init__(self, config: VideoLlama2Config, attention: str = "sdpa") -> None:
        super().__init__()
        self.image_size = config.vision.image_size
        self.layers_used = config.vision_layers
        self.siglip = SiglipVisionModel(SiglipVisionConfig(**asdict(config.vision), attn_implementation=attention))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode frames.

        Args:
            pixels: [B*T,3,P,P] in [-1, 1], any float dtype (cast to the tower's).

        Returns:
            [B*T,N,Dv] features, N = (P // patch)^2, row-major.

        Raises:
            ValueError: for frames of another size than the position table's.
        """
        if pixels.ndim != 4 or pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"vision tower: pixels of shape {tuple(pixels.shape)}, but [frames, 3, {self.image_size}, "
                f"{self.image_size}] is needed; resize the frames to vision_config.image_size"
            )
        hidden = self.siglip.embeddings(pixels)
        for layer in self.siglip.encoder.layers[: self.layers_used]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def reset_buffers(self, device: torch.device | str) -> None:
        """Give the position index, which no checkpoint stores, its value on `device` (after a meta construction)."""
        embeddings = self.siglip.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand(1, -1)
