"""J, F and S, exactly as the official Ref-AVS evaluator computes them, from one pass over the pixels.

Every reported number belongs to one of these protocols, none of which is neutral: J and F move by points with them.

| protocol       | J above | size    | rows per batch | ground truth                   | source                     |
|----------------|---------|---------|----------------|--------------------------------|----------------------------|
| official       | 0.4     | 256x256 | 4, file order  | bilinear of 0/255, then > 0    | Ref-AVS utils/metric       |
| per_expression | 0.5     | native  | 1              | as stored                      | AURORA utility.py, sigmoid |
| s4, ms3        | 0.5     | 224x224 | 4, file order  | as stored (224), else nearest  | AVSBench utils/utility.py  |

Deviations from the released code (Ref-AVS utils/metric/utility.py; AURORA utility.py):

1. Speed. The released F compares every pixel with 255 thresholds, one after the other. Here each pixel is put once
   into the bin of the last threshold it reaches; reverse cumulative sums of two histograms (all pixels, ground-truth
   pixels) give the same integer counts for every threshold, and the same float32 formula follows. Values are equal to
   the bit (tests/test_metrics.py holds the literal loops).
2. F takes probabilities (sigmoid applied, as Ref-AVS does); AURORA's release sweeps raw logits.
3. Errors. NaN, other dtypes and shape mismatches are refused instead of scored.

Definitions over the N frames of one evaluation batch, p = sigmoid(logit):
    J  mean over frames of |p > c and G| / |p > c or G|; where G is empty, the share of pixels that are not predicted
    F  beta^2 = 0.3; per frame a curve over thresholds t = linspace(0, 1 - 1e-10, 255), p >= t; mean curve of the
       frames with a non-empty G; its maximum; 0 if no frame has an object
    S  sqrt(share of pixels with p > 0.5), one square root over the batch (lower is better; for clips without a target)
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

THRESHOLDS = torch.linspace(0, 1 - 1e-10, 255)
"""float32 [255]. torch's linspace on the CPU: numpy's differs in ten entries by one unit in the last place."""

S_THRESHOLD = 0.5
_BETA2 = 0.3
_BINS = 256
_EXACT_FLOAT32 = 2**24
_VECTOR = 64
"""Frames whose pixel count is a multiple of this are never split across a vector register by torch's kernels, so the
sigmoid of a frame equals, to the bit, the same frame's part in the sigmoid of the whole batch."""


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


@dataclass(frozen=True)
class Scores:
    """One evaluation batch: J and F in [0, 1] (higher is better), S in [0, 1] (lower is better)."""

    j: float
    f: float
    s: float


@dataclass(frozen=True)
class Counts:
    """All that J, F and S need to know of N frames of equal size: integers, so that pooling is exact in any order."""

    histogram: np.ndarray
    """int64 [N,256]: pixels per bin. Bins 0..254 are those of THRESHOLDS, with the bin that holds the J threshold
    split in two at that threshold."""
    gt_histogram: np.ndarray
    """int64 [N,256]: the same for ground-truth pixels."""
    above_half: np.ndarray
    """int64 [N]: pixels with probability > 0.5."""
    pixels: int
    """H * W of a frame."""

    def __len__(self) -> int:
        return len(self.histogram)

    @staticmethod
    def concatenate(parts: Sequence[Counts]) -> Counts:
        """Frames of several rows in order. Raises ValueError for none, or for rows of different frame size."""
        if len({part.pixels for part in parts}) != 1:
            sizes = sorted({part.pixels for part in parts})
            raise ValueError(f"counts of frames with {sizes} pixels cannot be pooled; a protocol compares at one size")
        return Counts(
            np.concatenate([part.histogram for part in parts]),
            np.concatenate([part.gt_histogram for part in parts]),
            np.concatenate([part.above_half for part in parts]),
            parts[0].pixels,
        )

    def pack(self) -> str:
        """ASCII text of a few hundred bytes per frame, for a JSON line; `unpack` gives back equal counts."""
        table = np.concatenate([self.histogram, self.gt_histogram, self.above_half[:, None]], axis=1).astype("<i8")
        head = np.array([len(self), self.pixels], "<i8").tobytes()
        return base64.b85encode(zlib.compress(head + table.tobytes(), 6)).decode("ascii")

    @staticmethod
    def unpack(text: str) -> Counts:
        """Inverse of `pack`. Raises ValueError for text that `pack` did not make."""
        try:
            values = np.frombuffer(zlib.decompress(base64.b85decode(text)), "<i8")
        except zlib.error as error:
            raise ValueError(f"packed counts are damaged ({error}); delete their line and run again") from error
        frames, pixels = int(values[0]), int(values[1])
        table = values[2:].reshape(frames, 2 * _BINS + 1)
        return Counts(table[:, :_BINS].copy(), table[:, _BINS : 2 * _BINS].copy(), table[:, -1].copy(), pixels)


def score_batch(logits: Tensor, masks: Tensor, protocol: str | Protocol) -> Scores:
    """J, F and S of one evaluation batch as `protocol` pools it. Nothing is resized here (see `fit_logits`).

    Args:
        logits: float [N,T,H,W] (N rows of T frames); any floating dtype, cast to float32 first, since the coarse steps
            of bfloat16 tie probabilities. Infinite logits are saturated probabilities.
        masks: bool [N,T,H,W], the ground truth.
        protocol: a name of `PROTOCOLS` or a `Protocol`.

    Raises:
        ValueError: NaN logits, other dtypes, shapes that differ or hold no pixel, or an unknown protocol.
    """
    if logits.ndim != 4 or logits.shape != masks.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and masks {tuple(masks.shape)} must both be [N,T,H,W] of the same shape"
        )
    return score_counts(count_frames(logits.flatten(0, 1), masks.flatten(0, 1), protocol), protocol)


def count_frames(logits: Tensor, masks: Tensor, protocol: str | Protocol) -> Counts:
    """The histograms of N frames: logits float [N,H,W], masks bool [N,H,W]. Raises ValueError as `score_batch` does."""
    rule = get_protocol(protocol)
    logits, masks = _checked(logits, masks)
    frames, height, width = logits.shape
    histograms = np.zeros((2, frames, _BINS), np.int64)
    counts = Counts(histograms[0], histograms[1], np.zeros(frames, np.int64), height * width)
    binning = _Binning(rule.j_threshold, (height, width))
    pairs = zip(_frame_probabilities(logits), masks.view(torch.uint8).numpy(), strict=True)
    for i, (probability, mask) in enumerate(pairs):
        if np.isnan(probability.max()):
            raise ValueError(f"logits of frame {i} hold NaN; a mask with NaN has no score")
        code = binning(probability)
        counts.histogram[i] = _histogram(code)
        x, y, w, h = cv2.boundingRect(mask)
        if w * h:
            window = (slice(y, y + h), slice(x, x + w))
            counts.gt_histogram[i] = _histogram(code[window], mask[window])
        counts.above_half[i] = np.count_nonzero(probability > np.float32(S_THRESHOLD))
    return counts


def score_counts(counts: Counts, protocol: str | Protocol) -> Scores:
    """J, F and S of the pooled frames of one batch, in float32 as released. Raises ValueError for no frames."""
    if len(counts) == 0:
        raise ValueError("a batch without frames has no score")
    split = _j_bin(get_protocol(protocol).j_threshold)
    selected = _at_least(counts.histogram)
    hits = _at_least(counts.gt_histogram)
    gt = hits[:, 0]
    thresholds = np.delete(np.arange(_BINS), split)
    share = torch.tensor(int(counts.above_half.sum())) / (len(counts) * counts.pixels)
    return Scores(
        j=_mean_iou(selected[:, split], hits[:, split], gt, counts.pixels),
        f=_max_f(selected[:, thresholds], hits[:, thresholds], gt),
        s=torch.sqrt(share).item(),
    )


def _checked(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if not logits.is_floating_point():
        raise ValueError(f"logits have dtype {logits.dtype}; scores need floating-point logits, not masks or classes")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks have dtype {masks.dtype}; ground truth must be bool (compare the image with 0 first)")
    if logits.ndim != 3 or logits.shape != masks.shape or 0 in logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and masks {tuple(masks.shape)} must be of the same non-empty shape [N,H,W]"
        )
    return logits.detach().to("cpu", torch.float32).contiguous(), masks.detach().cpu().contiguous()


def _frame_probabilities(logits: Tensor) -> Iterator[np.ndarray]:
    """float32 [H,W] per frame. Frames share one buffer where that cannot change a bit (it saves the page faults that
    otherwise cost four fifths of the sigmoid's time)."""
    frames, height, width = logits.shape
    if height * width % _VECTOR:
        yield from torch.sigmoid(logits).numpy()
        return
    buffer = torch.empty(height * width)
    for frame in logits.view(frames, -1):
        yield torch.sigmoid(frame, out=buffer).view(height, width).numpy()


def _j_bin(j_threshold: float) -> int:
    """Code of the first bin above the J threshold: one more than the last of THRESHOLDS that is <= it."""
    return int((THRESHOLDS <= j_threshold).sum())


class _Binning:
    """Probabilities float32 [H,W] -> uint8 code: how many of THRESHOLDS[1:] are <= p, plus 1 if p > j_threshold.

    A rounded product guesses the bin or the one below it (slack 1e-3 of a bin against rounding errors of 1e-5), and
    one exact comparison with the next threshold repairs the guess. 255 bins and the J edge fill one byte exactly.
    """

    def __init__(self, j_threshold: float, size: tuple[int, int]) -> None:
        self.j_threshold = np.float32(j_threshold)
        self.next_threshold = np.full((1, 256), np.inf, np.float32)
        self.next_threshold[0, : len(THRESHOLDS) - 1] = THRESHOLDS[1:].numpy()
        self.code = np.empty(size, np.uint8)
        self.edge = np.empty(size, np.float32)
        self.flag = np.empty(size, np.bool_)

    def __call__(self, probability: np.ndarray) -> np.ndarray:
        cv2.convertScaleAbs(probability, dst=self.code, alpha=253.5, beta=-0.499)
        cv2.LUT(self.code, self.next_threshold, dst=self.edge)
        for edge, above in ((self.edge, np.greater_equal), (self.j_threshold, np.greater)):
            above(probability, edge, out=self.flag)
            np.add(self.code, self.flag.view(np.uint8), out=self.code)
        return self.code


def _histogram(code: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Pixels per code (where mask is not 0). OpenCV counts in float32, which is exact below 2^24 pixels."""
    if code.size >= _EXACT_FLOAT32:
        return np.bincount((code if mask is None else code[mask > 0]).ravel(), minlength=_BINS)
    return cv2.calcHist([code], [0], mask, [_BINS], [0, _BINS]).ravel().astype(np.int64)


def _at_least(histogram: np.ndarray) -> np.ndarray:
    """[N,256] -> [N,256]: pixels whose code is at least the column's."""
    return np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1]


def _mean_iou(selected: np.ndarray, hits: np.ndarray, gt: np.ndarray, pixels: int) -> float:
    """`mask_iou` of the released code, from pixel counts [N]."""
    empty = gt == 0
    inter = np.where(empty, pixels - selected, hits)
    union = np.where(empty, pixels, selected + gt - hits)
    ratio = torch.from_numpy(inter).float() / (torch.from_numpy(union).float() + 1e-7)
    return (torch.sum(ratio) / len(ratio)).item()


def _max_f(selected: np.ndarray, hits: np.ndarray, gt: np.ndarray) -> float:
    """`Eval_Fmeasure` of the released code, from pixel counts [N,255] per threshold and [N]."""
    kept = np.flatnonzero(gt)
    if not len(kept):
        return 0.0
    positives = torch.from_numpy(hits[kept]).float()
    precision = positives / (torch.from_numpy(selected[kept]).float() + 1e-20)
    recall = positives / (torch.from_numpy(gt[kept]).float()[:, None] + 1e-20)
    curves = (1 + _BETA2) * precision * recall / (_BETA2 * precision + recall)
    total = torch.zeros(curves.shape[1])
    for curve in torch.nan_to_num(curves, nan=0.0):
        total = total + curve
    return (total / len(kept)).max().item()
