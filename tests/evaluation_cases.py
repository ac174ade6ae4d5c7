"""Hand-made samples and predictions for the tests of scoring, pictures and reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from utils.types import Prediction, Sample

CLASSES = ("cat", "hair-dryer")


def make_sample(row: int, kind: str = "visual", class_name: str | None = None, empty: bool = False,
                size: tuple[int, int] = (48, 64), frames: int = 4, **fields: Any) -> Sample:
    """A clip with one moving disc (or none), its class alternating with the row."""
    name = class_name or CLASSES[row % 2]
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    masks = torch.stack([(y - 20) ** 2 + (x - 10 - 5 * t - row) ** 2 < 90 for t in range(frames)])
    pictures = np.random.default_rng(row).integers(0, 255, (frames, *size, 3), dtype=np.uint8)
    values: dict[str, Any] = {
        "row": row, "uid": f"clip_{name}_{row}", "clip": "clip", "split": "test_s", "class_name": name,
        "reference": f"the thing number {row}", "kind": kind, "pixel_values": torch.zeros(frames, 3, 8, 8),
        "sam_pixels": torch.zeros(frames, 3, 8, 8), "sam_size": (8, 8), "fbank": torch.zeros(10, 4),
        "masks": torch.zeros_like(masks) if empty else masks, "prompt_ids": torch.zeros(3, dtype=torch.long),
        "answer_ids": torch.zeros(0, dtype=torch.long), "teacher_ids": torch.zeros(0, dtype=torch.long),
        "video_key": "clip", "audio_key": "clip", "frames": pictures, "truth": {"says": "cat"},
    }
    return Sample(**{**values, **fields})


def make_prediction(sample: Sample, seed: int = 0, text: str | None = None, has_seg: bool = True,
                    logits: torch.Tensor | None = None) -> Prediction:
    """The true mask shifted, with noise; every third answer names another class."""
    noise = torch.randn(sample.masks.shape, generator=torch.Generator().manual_seed(seed))
    name = CLASSES[(sample.row + (sample.row % 3 == 0)) % 2]
    text = f"I see a {name}. The target is the {name}. It is [SEG]." if text is None else text
    made = torch.where(sample.masks.roll(2, -1), 3.0, -3.0) + noise
    return Prediction(sample.row, text, name, made if logits is None else logits, has_seg)
