"""Confidence intervals of mean scores by the bootstrap over clips.

Several expressions ask about one clip and their scores go together, so whole clips are drawn with replacement, never
single rows; an interval over rows would be too narrow.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with its percentile interval; one clip alone has no interval."""

    mean: float
    low: float | None
    high: float | None
    rows: int
    clips: int


def mean_intervals(
    values: np.ndarray, clips: Sequence[Hashable], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> list[Estimate]:
    """The mean of each column over rows, with a percentile interval from resampled clips.

    Args:
        values: float [N,K], K scores of N rows; the same draws serve all columns.
        clips: N names; rows of one clip are drawn together.
        draws: number of resamples.
        level: share of the resampled means that the interval holds.
        seed: of the draws; equal input gives equal intervals.

    Raises:
        ValueError: no rows, unequal lengths, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) != len(clips) or not len(values):
        raise ValueError(f"values {values.shape} must be [N,K] with N = {len(clips)} clip names and N > 0")
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity; a row without a score must be left out before")
    index = {clip: i for i, clip in enumerate(dict.fromkeys(clips))}
    owner = np.array([index[clip] for clip in clips])
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, owner, values)
    means = values.mean(0)
    if len(index) == 1:
        return [Estimate(float(mean), None, None, len(values), 1) for mean in means]
    sizes = np.bincount(owner)
    chosen = np.random.default_rng(seed).multinomial(len(index), np.full(len(index), 1 / len(index)), size=draws)
    resampled = (chosen @ sums) / (chosen @ sizes)[:, None]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [
        Estimate(float(mean), float(a), float(b), len(values), len(index))
        for mean, a, b in zip(means, low, high, strict=True)
    ]
