"""Where a model is good and where two models differ: groups of rows with intervals, and paired comparisons.

Row scores are those of protocol per_expression (the official protocol pools four rows into one value, so a row has
none); null rows have only S and form a dimension of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.report.runs import Evaluation, PredictedRow, shared_rows

SCORES = ("J", "F", "J&F")
DRAWS, LEVEL = 2000, 0.95
"""Resamples of an interval, and the share of the resampled means that it holds."""
TIE = 1.0
"""A change of J&F of at most this many points is neither a win nor a loss."""
SHOWN = 12
"""Rows listed at either end of a comparison."""
SPLIT_TITLES = {"test_s": "seen (test_s)", "test_u": "unseen (test_u)"}
"""Splits of Ref-AVS; others go by their own names."""
_SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Estimate:
    """A mean over rows with its percentile interval; one clip alone has no interval."""

    mean: float
    low: float | None
    high: float | None
    rows: int
    clips: int


@dataclass(frozen=True)
class Group:
    """The scores of some rows, in percent."""

    scores: Mapping[str, Estimate]
    """J, F and J&F; or S alone."""
    class_accuracy: float | None
    """Of the rows whose class is known; None without any."""


@dataclass(frozen=True)
class Change:
    """One row that both evaluations predicted."""

    before: PredictedRow
    after: PredictedRow

    @property
    def points(self) -> float:
        """J&F after minus before; only for rows with an object."""
        return self.after.jf - self.before.jf


@dataclass(frozen=True)
class GroupChange:
    """The rows of a group under two evaluations: mean J&F of either, and what lies between them."""

    before: float
    after: float
    change: Estimate
    wins: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """`after` against `before` on the rows that both predicted and that have an object."""

    before: str
    after: str
    groups: Mapping[str, GroupChange]
    """All rows first, then by split and by question kind."""
    class_won: int
    """Rows whose class only `after` names rightly."""
    class_lost: int
    gains: Sequence[Change]
    """Largest first."""
    losses: Sequence[Change]
    """Largest first."""


def mean_intervals(
    values: np.ndarray, clips: Sequence[Hashable], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> list[Estimate]:
    """The mean of each column over rows, with a percentile interval of the bootstrap over clips.

    Several expressions ask about one clip and their scores go together, so whole clips are drawn with replacement
    (scipy.stats.bootstrap draws single rows): an interval over rows would be too narrow.

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
    number = len(index)
    if number == 1:
        return [Estimate(float(mean), None, None, len(values), 1) for mean in values.mean(0)]
    sums = np.zeros((number, values.shape[1]))
    np.add.at(sums, owner, values)
    # How often each clip is drawn is all that a resample decides, so resampled means are two matrix products.
    times = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    resampled = (times @ sums) / (times @ np.bincount(owner))[:, None]
    bounds = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    columns = zip(values.mean(0).tolist(), *bounds.tolist(), strict=True)
    return [Estimate(mean, low, high, len(values), number) for mean, low, high in columns]


def size_names(sizes: Mapping[int, float]) -> dict[int, str]:
    """Row -> its third by mask size.

    Args:
        sizes: row -> mean share of the frame that the true object covers, in [0, 1]; rows without an object left out.
    """
    if len(set(sizes.values())) < 3:
        return {}
    low, high = (float(q) for q in np.quantile(list(sizes.values()), [1 / 3, 2 / 3]))
    bounds = (f"up to {100 * low:.1f} %", f"up to {100 * high:.1f} %", f"over {100 * high:.1f} %")
    names = [f"{word} ({bound})" for word, bound in zip(_SIZES, bounds, strict=True)]
    return {row: names[(size > low) + (size > high)] for row, size in sizes.items()}


def break_down(rows: Sequence[PredictedRow], sizes: Mapping[int, str]) -> dict[str, dict[str, Group]]:
    """Dimension -> name of a group -> its scores; dimensions that the data do not have are left out.

    Args:
        rows: of one evaluation.
        sizes: row -> name of its size (`size_names`); may lack rows.
    """
    found = [row for row in rows if not row.is_null]
    ways = {
        "Split": _grouped(found, lambda row: SPLIT_TITLES.get(row.split, row.split)),
        "Question kind": _grouped(found, lambda row: row.kind),
        "Mask size": _grouped(found, lambda row: sizes.get(row.row, ""), lambda name: _SIZES.index(name.split()[0])),
        "Class": _grouped(found, lambda row: row.class_name),
        "Null references": _grouped(rows, lambda row: "test_n: S, lower is better" if row.is_null else ""),
    }
    return {title: {name: _group(group) for name, group in way.items()} for title, way in ways.items() if way}


def compare(before: Evaluation, after: Evaluation) -> Comparison | None:
    """Paired comparison; None where no row with an object is shared.

    Raises:
        DataError: the evaluations are of different data (see `shared_rows`).
    """
    both = [Change(before.rows[n], after.rows[n]) for n in shared_rows(before, after)]
    both = [change for change in both if not change.before.is_null]
    if not both:
        return None
    named = {"all rows": both}
    for groups in (
        _grouped(both, lambda c: SPLIT_TITLES.get(c.before.split, c.before.split)),
        _grouped(both, lambda c: c.before.kind),
    ):
        named |= groups if len(groups) > 1 else {}
    ranked = sorted(both, key=lambda c: (-c.points, c.before.row))
    return Comparison(
        before.name,
        after.name,
        {name: _group_change(changes) for name, changes in named.items()},
        sum(bool(c.after.class_right and not c.before.class_right) for c in both),
        sum(bool(c.before.class_right and not c.after.class_right) for c in both),
        [c for c in ranked[:SHOWN] if c.points > TIE],
        [c for c in ranked[: -SHOWN - 1 : -1] if c.points < -TIE],
    )


def _grouped(
    items: Iterable[Any], name_of: Callable[[Any], str], order: Callable[[str], Any] | None = None
) -> dict[str, list[Any]]:
    """Items by name, in order of the names; those without a name are left out."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(name_of(item), []).append(item)
    groups.pop("", None)
    return {name: groups[name] for name in sorted(groups, key=order)}


def _group(rows: Sequence[PredictedRow]) -> Group:
    if all(row.is_null for row in rows):
        titles, values = ("S",), [[row.scores["S"]] for row in rows]
    else:
        titles, values = SCORES, [[row.scores["J"], row.scores["F"], row.jf] for row in rows]
    estimates = mean_intervals(np.array(values), [row.clip for row in rows])
    named = [row.class_right for row in rows if row.class_right is not None]
    return Group(dict(zip(titles, estimates, strict=True)), 100 * float(np.mean(named)) if named else None)


def _group_change(changes: Sequence[Change]) -> GroupChange:
    values = np.array([[change.before.jf, change.after.jf, change.points] for change in changes])
    before, after, change = mean_intervals(values, [change.before.clip for change in changes])
    wins, losses = (values[:, 2] > TIE).sum(), (values[:, 2] < -TIE).sum()
    return GroupChange(before.mean, after.mean, change, int(wins), int(losses))
