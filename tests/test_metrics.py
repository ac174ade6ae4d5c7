"""J, F and S against loops written from the definitions of the published evaluator, over every awkward case."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from utils.metrics import (
    PROTOCOLS,
    Counts,
    Protocol,
    _Binning,
    count_frames,
    fit_logits,
    fit_masks,
    score_batch,
    score_counts,
)

J_THRESHOLDS = {"official": 0.4, "per_expression": 0.5, "s4": 0.5, "ms3": 0.5}


def oracle_j(logits, masks, threshold):
    """Frame by frame: intersection over union at p > threshold; the background share where there is no object."""
    frames = logits.flatten(0, 1)
    predicted = torch.sigmoid(frames) > threshold
    ratios = []
    for prediction, mask in zip(predicted, masks.flatten(0, 1), strict=True):
        if mask.any():
            inter, union = (prediction & mask).sum(), (prediction | mask).sum()
        else:
            inter, union = (~prediction).sum(), torch.tensor(mask.numel())
        ratios.append(inter.float() / (union.float() + 1e-7))
    return (torch.stack(ratios).sum() / len(ratios)).item()


def oracle_f(logits, masks):
    """255 passes over each frame that holds an object; curves averaged; one maximum."""
    probabilities = torch.sigmoid(logits.flatten(0, 1))
    total, used = torch.zeros(255), 0
    for probability, mask in zip(probabilities, masks.flatten(0, 1).float(), strict=True):
        if mask.sum() == 0:
            continue
        precision, recall = torch.zeros(255), torch.zeros(255)
        for i, threshold in enumerate(torch.linspace(0, 1 - 1e-10, 255)):
            selected = (probability >= threshold).float()
            hits = (selected * mask).sum()
            precision[i] = hits / (selected.sum() + 1e-20)
            recall[i] = hits / (mask.sum() + 1e-20)
        curve = 1.3 * precision * recall / (0.3 * precision + recall)
        curve[torch.isnan(curve)] = 0
        total, used = total + curve, used + 1
    return (total / used).max().item() if used else 0.0


def oracle_s(logits):
    """The root of the share of pixels above one half, all frames pooled."""
    return torch.sqrt((torch.sigmoid(logits) > 0.5).sum() / logits.numel()).item()


def disc(size, centre, radius):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def cases():
    """name -> (logits [N,T,H,W], masks [N,T,H,W])"""
    g = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731 - a one-line sampler bound to the generator
    size = (4, 3, 32, 32)
    some = torch.rand(size, generator=g) > 0.7
    partly_empty = some.clone()
    partly_empty[1] = False
    partly_empty[2, 1:] = False
    one_pixel = torch.zeros(size, dtype=torch.bool)
    one_pixel[..., 5, 9] = True
    last_pixel = torch.zeros(size, dtype=torch.bool)
    last_pixel[..., -1, -1] = True
    discs = torch.stack([disc((40, 48), (20, 10 + 3 * t), 8) for t in range(10)])[None].repeat(2, 1, 1, 1)
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    ties = torch.logit(thresholds[torch.randint(1, 254, size, generator=g)])
    tail = torch.tensor([-math.inf, math.inf, 17.0, -17.0, 88.0, -104.0, 0.0, -0.0])
    return {
        "random": (normal(*size) * 3, some),
        "random_wide": (normal(*size) * 30, some),
        "odd_size": (normal(3, 2, 7, 13) * 3, torch.rand(3, 2, 7, 13, generator=g) > 0.5),
        "one_frame": (normal(1, 1, 16, 16), torch.rand(1, 1, 16, 16, generator=g) > 0.5),
        "one_by_one": (normal(2, 2, 1, 1), torch.tensor([[[[True]], [[False]]], [[[True]], [[True]]]])),
        "column": (normal(1, 3, 9, 1), torch.rand(1, 3, 9, 1, generator=g) > 0.4),
        "tied_two_values": (torch.where(normal(*size) > 0, 1.25, -0.5), some),
        "tied_constant": (torch.full(size, 0.3), some),
        "exactly_half": (torch.zeros(size), some),
        "at_0.4": (torch.logit(torch.full(size, 0.4)), some),
        "on_thresholds": (ties, some),
        "empty_truth": (normal(*size), torch.zeros(size, dtype=torch.bool)),
        "some_frames_empty": (normal(*size), partly_empty),
        "full_truth": (normal(*size), torch.ones(size, dtype=torch.bool)),
        "one_pixel": (normal(*size), one_pixel),
        "last_pixel": (normal(*size), last_pixel),
        "nothing_predicted": (torch.full(size, -1e4), some),
        "everything_predicted": (torch.full(size, 1e4), some),
        "nothing_of_nothing": (torch.full(size, -1e4), torch.zeros(size, dtype=torch.bool)),
        "saturated_right": (torch.where(some, 40.0, -40.0), some),
        "saturated_wrong": (torch.where(some, -40.0, 40.0), some),
        "infinite": (tail[torch.randint(0, len(tail), size, generator=g)], some),
        "low_confidence": (torch.where(some, -4.0, -8.0) + normal(*size) * 0.1, some),
        "discs": (torch.where(discs.roll(2, -1), 6.0, -6.0) + normal(*discs.shape), discs),
        "larger": (normal(1, 2, 256, 256) * 2, torch.rand(1, 2, 256, 256, generator=g) > 0.9),
    }


@pytest.mark.parametrize("protocol", ["official", "per_expression", "s4", "ms3"])
@pytest.mark.parametrize("name", list(cases()))
def test_equal_to_the_loops_to_the_bit(name, protocol):
    logits, masks = cases()[name]
    scores = score_batch(logits, masks, protocol)
    assert scores.j == oracle_j(logits, masks, J_THRESHOLDS[protocol])
    assert scores.f == oracle_f(logits, masks)
    assert scores.s == oracle_s(logits)


def test_probabilities_beside_every_threshold_fall_into_the_right_bin():
    """The guessed bin is off only next to thresholds: try each threshold and its float neighbours, 3 to each side."""
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    values = [thresholds]
    for direction in (0.0, 2.0):
        step = thresholds
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(direction)).clamp(0, 1)
            values.append(step)
    values.append(torch.tensor([0.4, 0.5, np.nextafter(np.float32(0.4), np.float32(1)), 1e-30, 1e-45]))
    probability = torch.cat(values)

    for edge in (0.4, 0.5):
        code = _Binning(edge, (1, len(probability)))(probability.numpy()[None]).ravel()
        wanted = (probability[:, None] >= thresholds[1:]).sum(1) + (probability > edge)
        assert code.tolist() == wanted.tolist()


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_j_threshold_of_each_protocol(protocol):
    logits = torch.full((1, 1, 8, 8), math.log(0.45 / 0.55))
    scores = score_batch(logits, torch.ones(1, 1, 8, 8, dtype=torch.bool), protocol)
    assert scores.j == (1.0 if protocol == "official" else 0.0)


def test_hand_values():
    """4 x 4 pixels: truth 4, predicted 4 of which 2 right, and an empty frame with a 3/16 false mask."""
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    masks[0, 0, :2, :2] = True
    logits = torch.full((1, 2, 4, 4), -20.0)
    logits[0, 0, 0, :] = 20.0
    logits[0, 1, 0, :3] = 20.0
    scores = score_batch(logits, masks, "official")
    assert scores.j == pytest.approx((2 / 6 + 13 / 16) / 2, abs=1e-6)
    assert scores.f == pytest.approx(0.5, abs=1e-6)  # precision = recall = 1/2, above 1.3a/(0.3a+1) = .302 of "all"
    assert scores.s == pytest.approx(math.sqrt(7 / 32), abs=1e-6)


def test_a_missed_object_keeps_the_floor_of_the_published_f():
    """Threshold 0 selects every pixel, so an empty mask has F = 1.3a/(0.3a+1), a = area of the object."""
    masks = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    masks[..., :4, :] = True
    scores = score_batch(torch.full((1, 1, 16, 16), -1e4), masks, "official")
    assert scores.j == 0
    assert scores.f == pytest.approx(1.3 * 0.25 / (0.3 * 0.25 + 1), abs=1e-6)


def test_pooling_is_not_the_mean_of_rows():
    """One maximum (F) and one root (S) per batch: pooled F <= mean of row F, pooled S >= mean of row S."""
    logits, masks = cases()["random"]
    logits = logits + torch.tensor([-3.0, -1.0, 1.0, 3.0])[:, None, None, None]
    pooled = score_batch(logits, masks, "official")
    rows = [score_batch(logits[i : i + 1], masks[i : i + 1], "official") for i in range(4)]
    assert pooled.f < np.mean([r.f for r in rows]) - 1e-3
    assert pooled.s > np.mean([r.s for r in rows]) + 1e-3
    assert pooled.j == pytest.approx(np.mean([r.j for r in rows]), abs=1e-6)


def test_counts_pooled_from_rows_equal_the_batch_to_the_bit():
    logits, masks = cases()["some_frames_empty"]
    rows = [count_frames(logits[i], masks[i], "official") for i in range(4)]
    packed = [Counts.unpack(row.pack()) for row in rows]
    assert score_counts(Counts.concatenate(packed), "official") == score_batch(logits, masks, "official")


def test_damaged_counts_are_refused():
    text = count_frames(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool), "official").pack()
    with pytest.raises(ValueError, match="damaged"):
        Counts.unpack(text[:20])
    with pytest.raises(ValueError, match="cannot be pooled"):
        other = count_frames(torch.zeros(1, 4, 5), torch.zeros(1, 4, 5, dtype=torch.bool), "official")
        Counts.concatenate([Counts.unpack(text), other])


def test_half_precision_is_cast_before_the_sigmoid():
    logits, masks = cases()["random"]
    coarse = logits.to(torch.bfloat16)
    assert score_batch(coarse, masks, "official") == score_batch(coarse.float(), masks, "official")


@pytest.mark.parametrize(
    ("logits", "masks", "message"),
    [
        (torch.full((1, 2, 4, 4), math.nan), torch.zeros(1, 2, 4, 4, dtype=torch.bool), "frame 0 hold NaN"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.zeros(1, 2, 4, 4, dtype=torch.bool), "floating-point"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), "must be bool"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5, dtype=torch.bool), "same shape"),
        (torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool), r"\[N,T,H,W\]"),
        (torch.zeros(0, 2, 4, 4), torch.zeros(0, 2, 4, 4, dtype=torch.bool), "non-empty"),
    ],
)
def test_bad_input_is_refused(logits, masks, message):
    with pytest.raises(ValueError, match=message):
        score_batch(logits, masks, "official")


def test_one_nan_among_many_pixels_is_found():
    logits = torch.zeros(1, 3, 64, 64)
    logits[0, 2, 63, 63] = math.nan
    with pytest.raises(ValueError, match="frame 2 hold NaN"):
        score_batch(logits, torch.zeros(1, 3, 64, 64, dtype=torch.bool), "official")


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="official, per_expression"):
        score_batch(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.bool), "davis")


def test_official_ground_truth_is_the_published_resize():
    """The published loader resizes the three-channel 0/255 image and compares its grey value with 0."""
    masks = torch.stack([disc((72, 128), (30, 40), 11), disc((72, 128), (60, 100), 20)])
    for mask, fitted in zip(masks, fit_masks(masks, "official"), strict=True):
        image = np.repeat((mask.numpy() * 255).astype(np.uint8)[..., None], 3, axis=2)
        grey = cv2.cvtColor(cv2.resize(image, (256, 256)), cv2.COLOR_BGR2GRAY)
        assert np.array_equal(grey > 0, fitted.numpy())
    assert fit_masks(masks, "official").sum() > fit_masks(masks, Protocol("n", 0.4, 256, 4, "nearest")).sum()


def test_resizing_rules():
    logits = torch.randn(3, 30, 40, generator=torch.Generator().manual_seed(0))
    assert fit_logits(logits, "per_expression").equal(logits)
    assert fit_logits(logits, "ms3").shape == (3, 224, 224)
    wanted = torch.nn.functional.interpolate(logits[None], size=(256, 256), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(fit_logits(logits.double(), "official"), wanted, atol=1e-6, rtol=0)
    masks = logits > 0
    assert fit_masks(masks, "per_expression").equal(masks)
    native = torch.zeros(2, 256, 256, dtype=torch.bool)
    assert fit_masks(native, "official").equal(native)
    with pytest.raises(ValueError, match="must be bool"):
        fit_masks(logits, "official")
