"""VideoLLaMA2.1-7B-AV at any size: vision tower, connector, audio tower, language model, splice and weights."""

from model.backbones.videollama2.splice import splice
from model.backbones.videollama2.weights import from_released, load_backbone

__all__ = ["from_released", "load_backbone", "splice"]
