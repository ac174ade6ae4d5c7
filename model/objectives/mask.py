"""Mask supervision: binary cross entropy and Dice of LISA, and their reduction over frames and queries.

Paper section 6.3 (eq. 6, 7 and 8) names the two losses without their form; they are LISA's (released code
LISA_sft_distill.py:18-61). A frame is the unit: both losses are computed per frame over all of its pixels. LISA sums
over the frames and divides by their number plus 1e-8, for one answer. For any batch: mean over the frames of a query,
then mean over the queries, so that a clip with few frames or at another size weighs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DICE_SCALE = 1000.0
"""Divides both sums of Dice; with DICE_EPS it sets the smoothing (released code LISA_sft_distill.py:22)."""

DICE_EPS = 1e-6
"""Smoothing of Dice, added after the division by DICE_SCALE: about a thousandth of a pixel."""


class MaskLosses(NamedTuple):
    """The two mask losses of a batch, not yet weighted."""

    bce: Tensor  # float32 scalar
    dice: Tensor  # float32 scalar


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy per frame: the mean over pixels. [T,H,W] logits, [T,H,W] targets in [0,1] -> float32 [T].

    Released code LISA_sft_distill.py:44-61 (`sigmoid_ce_loss`).
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return loss.flatten(1).mean(1)


def mask_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss per frame: 1 - (2 sum(p t)/1000 + 1e-6) / ((sum p + sum t)/1000 + 1e-6). [T,H,W] twice -> float32 [T].

    An empty target gives a loss near 1 whatever is predicted, unless the prediction is empty to a fraction of a pixel.
    Released code LISA_sft_distill.py:18-41 (`dice_loss`).
    """
    probabilities = logits.float().sigmoid().flatten(1)
    targets = targets.float().flatten(1)
    # Divided before the sum, as released: the order of the rounding is theirs.
    overlap = 2 * (probabilities / DICE_SCALE * targets).sum(1)
    total = (probabilities / DICE_SCALE).sum(1) + (targets / DICE_SCALE).sum(1)
    return 1 - (overlap + DICE_EPS) / (total + DICE_EPS)


def mask_losses(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> MaskLosses:
    """Both losses over the queries of a batch: mean over frames, then mean over queries.

    Args:
        logits: Q x [T,H,W]; sizes and frame counts may differ between queries.
        targets: Q x [T,H,W] bool, or float in [0,1] where `shrink_target` made them.

    Returns:
        MaskLosses; two zeros without gradient where there is no query.

    Raises:
        ValueError: counts or shapes disagree.
    """
    if len(logits) != len(targets):
        raise ValueError(f"{len(logits)} predicted masks against {len(targets)} targets")
    for i, (predicted, target) in enumerate(zip(logits, targets, strict=True)):
        if predicted.shape != target.shape:
            raise ValueError(f"query {i}: logits {tuple(predicted.shape)} against target {tuple(target.shape)}")
    if not logits:
        zero = torch.zeros(())
        return MaskLosses(zero, zero.clone())
    # Frames first, then queries: a clip with few annotated frames weighs as much as one with ten.
    bce = [mask_bce(p, t).mean() for p, t in zip(logits, targets, strict=True)]
    dice = [mask_dice(p, t).mean() for p, t in zip(logits, targets, strict=True)]
    return MaskLosses(torch.stack(bce).mean(), torch.stack(dice).mean())


def loss_shape(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """(height, width) at which the loss is computed: `size` itself, or scaled so that its long side is `longest`.

    The released code computes the losses at the native size of the frames (None here). A smaller side costs less
    memory and time, and blurs the boundary; sizes already within the limit are left alone.
    """
    height, width = size
    if longest is None or max(size) <= longest:
        return height, width
    scale = longest / max(size)
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink_target(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """bool masks [T,H,W] at another size: the covered share of each larger pixel, float32 in [0,1].

    Returned as they are (bool) where the size is already right. Averaging keeps objects that are thinner than one
    pixel of the smaller grid, which picking the nearest pixel would lose.
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), tuple(size), mode="area")[:, 0]
