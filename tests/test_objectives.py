"""Mask losses against formulas written out as loops, values worked by hand, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.objectives.mask import loss_shape, mask_bce, mask_dice, mask_losses, shrink_target


def loop_bce(logits: Tensor, targets: Tensor) -> list[float]:
    """Mean over pixels of -(t log p + (1-t) log(1-p)), one frame after another."""
    frames = []
    for frame, target in zip(logits.tolist(), targets.float().tolist(), strict=True):
        pixels = [(x, t) for row, trow in zip(frame, target, strict=True) for x, t in zip(row, trow, strict=True)]
        probs = [(1 / (1 + math.exp(-x)), t) for x, t in pixels]
        frames.append(-sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in probs) / len(probs))
    return frames


def loop_dice(logits: Tensor, targets: Tensor) -> list[float]:
    """LISA's Dice with its two constants, one frame after another."""
    frames = []
    for frame, target in zip(logits.tolist(), targets.float().tolist(), strict=True):
        overlap = total = 0.0
        for row, target_row in zip(frame, target, strict=True):
            for x, t in zip(row, target_row, strict=True):
                p = 1 / (1 + math.exp(-x))
                overlap += 2 * p * t / 1000
                total += (p + t) / 1000
        frames.append(1 - (overlap + 1e-6) / (total + 1e-6))
    return frames


def random_masks(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) > 0.6


def test_bce_and_dice_equal_the_loops() -> None:
    logits, targets = random_masks(0, 4, 5, 7)
    targets[2] = False
    torch.testing.assert_close(mask_bce(logits, targets), torch.tensor(loop_bce(logits, targets)))
    torch.testing.assert_close(mask_dice(logits, targets), torch.tensor(loop_dice(logits, targets)))


def test_values_worked_by_hand() -> None:
    """Logit 0 is probability 1/2: BCE log 2; Dice with 1 of 4 pixels set is 1 - 2*.5/(2+1), to the smoothing."""
    logits, target = torch.zeros(1, 2, 2), torch.tensor([[[1, 0], [0, 0]]])
    assert mask_bce(logits, target).item() == pytest.approx(math.log(2), abs=1e-6)
    assert mask_dice(logits, target).item() == pytest.approx(1 - (1e-3 + 1e-6) / (3e-3 + 1e-6), abs=1e-6)
    sure = torch.where(target.bool(), 60.0, -60.0)
    assert mask_bce(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert mask_dice(sure, target).item() == pytest.approx(0, abs=1e-6)
    empty = torch.zeros(1, 2, 2)
    assert mask_dice(torch.full((1, 2, 2), -60.0), empty).item() == pytest.approx(0, abs=1e-6)
    assert mask_dice(logits, empty).item() == pytest.approx(1 - 1e-6 / (2e-3 + 1e-6), abs=1e-6)


def test_gradients_equal_the_analytic_ones() -> None:
    logits, targets = random_masks(1, 2, 3, 4)
    logits = logits.double().requires_grad_()
    p, t, pixels = logits.detach().sigmoid(), targets.double(), 12

    (bce,) = torch.autograd.grad(mask_bce(logits, targets).sum(), logits)
    torch.testing.assert_close(bce, (p - t) / pixels, atol=1e-6, rtol=1e-5)

    (dice,) = torch.autograd.grad(mask_dice(logits, targets).sum(), logits)
    overlap = (2 * p * t / 1000).sum((1, 2), keepdim=True) + 1e-6
    total = ((p + t) / 1000).sum((1, 2), keepdim=True) + 1e-6
    by_p = -(2 * t / 1000 * total - overlap / 1000) / total**2
    torch.testing.assert_close(dice, by_p * p * (1 - p), atol=1e-6, rtol=1e-4)


def test_reduction_is_frames_then_answers() -> None:
    """Answers of 3 and 1 frames at different sizes weigh the same; summing frames over the batch would not do that."""
    long, long_target = random_masks(2, 3, 4, 6)
    short, short_target = random_masks(3, 1, 8, 5)
    losses = mask_losses([long, short], [long_target, short_target])
    bce = (sum(loop_bce(long, long_target)) / 3 + loop_bce(short, short_target)[0]) / 2
    dice = (sum(loop_dice(long, long_target)) / 3 + loop_dice(short, short_target)[0]) / 2
    assert losses.bce.item() == pytest.approx(bce, rel=1e-5)
    assert losses.dice.item() == pytest.approx(dice, rel=1e-5)


def test_one_answer_reduces_as_published() -> None:
    """sum over T frames / (T + 1e-8), LISA_sft_distill.py:40 and :60."""
    logits, targets = random_masks(4, 10, 4, 4)
    losses = mask_losses([logits], [targets])
    assert losses.bce.item() == pytest.approx(sum(loop_bce(logits, targets)) / (10 + 1e-8), rel=1e-5)
    assert losses.dice.item() == pytest.approx(sum(loop_dice(logits, targets)) / (10 + 1e-8), rel=1e-5)


def test_low_precision_logits_are_scored_in_float32() -> None:
    logits, targets = random_masks(5, 2, 9, 9)
    low = logits.bfloat16()
    assert mask_dice(low, targets).dtype == mask_bce(low, targets).dtype == torch.float32
    torch.testing.assert_close(mask_dice(low, targets), mask_dice(low.float(), targets), atol=0, rtol=0)


def test_no_answer_with_a_mask_is_zero() -> None:
    losses = mask_losses([], [])
    assert losses.bce.item() == losses.dice.item() == 0 and not losses.bce.requires_grad


def test_disagreeing_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predicted masks against 0"):
        mask_losses([torch.zeros(1, 2, 2)], [])
    with pytest.raises(ValueError, match="query 0"):
        mask_losses([torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 3)])


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((720, 1280), None, (720, 1280)),
        ((720, 1280), 1280, (720, 1280)),
        ((720, 1280), 320, (180, 320)),
        ((90, 30), 45, (45, 15)),
        ((1000, 2), 10, (10, 1)),
    ],
)
def test_loss_shape(size: tuple[int, int], longest: int | None, expected: tuple[int, int]) -> None:
    assert loss_shape(size, longest) == expected


def test_shrunk_targets_are_covered_shares() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 2:, 2:] = True
    torch.testing.assert_close(shrink_target(mask, (2, 2)), torch.tensor([[[0.25, 0.0], [0.0, 1.0]]]))
    assert shrink_target(mask, (4, 4)) is mask
