"""The evaluation protocols of audio-visual segmentation: how rows are grouped, resized and thresholded.

Every reported number belongs to one of these; none of the choices below is neutral (J and F move by points with them).

| protocol       | J above | size    | rows per batch | ground truth                   | source                     |
|----------------|---------|---------|----------------|--------------------------------|----------------------------|
| official       | 0.4     | 256x256 | 4, file order  | bilinear of 0/255, then > 0    | Ref-AVS utils/metric       |
| per_expression | 0.5     | native  | 1              | as stored                      | AURORA utility.py, sigmoid |
| s4, ms3        | 0.5     | 224x224 | 4, file order  | as stored (224), else nearest  | AVSBench utils/utility.py  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Protocol:
    """One way to turn mask logits of consecutive rows into J, F and S."""

    name: str
    j_threshold: float
    """J counts a pixel as predicted where its probability is strictly above this."""
    size: int | None
    """Side in pixels of the square at which masks are compared, or None for the native size."""
    rows_per_batch: int
    """Rows pooled into one value of J (frame mean), F (one maximum over thresholds) and S (one square root)."""
    mask_rule: Literal["bilinear_above_zero", "nearest"]
    """How ground truth of another size becomes `size`."""


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("official", 0.4, 256, 4, "bilinear_above_zero"),
        Protocol("per_expression", 0.5, None, 1, "nearest"),
        Protocol("s4", 0.5, 224, 4, "nearest"),
        Protocol("ms3", 0.5, 224, 4, "nearest"),
    )
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of that name. Raises ValueError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def fit_logits(logits: Tensor, protocol: str | Protocol) -> Tensor:
    """Mask logits [N,H,W] -> float32 [N,h,w] at the protocol's size.

    Logits, not probabilities and never binary masks, are interpolated (bilinear, half-pixel centres), as the official
    model does with its mask predictions.
    """
    size = get_protocol(protocol).size
    logits = logits.detach().to("cpu", torch.float32)
    if size is None or tuple(logits.shape[-2:]) == (size, size):
        return logits
    return torch.nn.functional.interpolate(logits[:, None], size=(size, size), mode="bilinear")[:, 0]


def fit_masks(masks: Tensor, protocol: str | Protocol) -> Tensor:
    """Ground truth bool [N,H,W] -> bool [N,h,w] at the protocol's size.

    Official rule: `cv2.resize` (bilinear) of the 0/255 image, then > 0, which grows objects by up to a pixel
    (datasets/dataset_refavs.py). Raises ValueError for masks that are not bool.
    """
    rule = get_protocol(protocol)
    if masks.dtype != torch.bool:
        raise ValueError(f"masks have dtype {masks.dtype}; ground truth must be bool (compare the image with 0 first)")
    masks = masks.detach().cpu()
    if rule.size is None or tuple(masks.shape[-2:]) == (rule.size, rule.size):
        return masks
    interpolation = cv2.INTER_LINEAR if rule.mask_rule == "bilinear_above_zero" else cv2.INTER_NEAREST
    images = masks.numpy().astype(np.uint8) * 255
    sized = [cv2.resize(image, (rule.size, rule.size), interpolation=interpolation) for image in images]
    return torch.from_numpy(np.stack(sized) > 0) if sized else torch.zeros(0, rule.size, rule.size, dtype=torch.bool)
