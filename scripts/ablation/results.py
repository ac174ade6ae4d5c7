"""What the finished runs of a table say: means over seeds, differences to one row, and how sure they are.

Two kinds of chance are kept apart. Seeds: each seed's difference to that row of the same seed, with Student's
interval of their mean. Clips: each metadata row's difference of J&F, averaged over the seeds, with the percentile
interval of a bootstrap over clips (`utils.report.breakdown`; protocol per_expression, as pooled protocols have no row
scores).
A difference is called significant where both 95 % intervals leave out 0; with one seed there is no telling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.ablation.tables import Row, Table
from utils.errors import DataError
from utils.report.breakdown import Estimate, mean_intervals
from utils.report.runs import Evaluation, read_evaluation, shared_rows

SCORES = ("J", "F", "J&F")
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom (beyond, the normal's is used)."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    deviation: float | None
    """Sample standard deviation; None with one seed."""
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % of the mean; None with one seed."""
        if self.deviation is None:
            return None
        freedom = self.seeds - 1
        quantile = T_95[freedom - 1] if freedom <= len(T_95) else 1.96
        half = quantile * self.deviation / math.sqrt(self.seeds)
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Line:
    """Our scores of one row on one split."""

    row: Row
    split: str
    scores: Mapping[str, Mean]
    """J, F, J&F in percent under the table's protocol."""
    n: int
    """Metadata rows scored."""
    extras: Mapping[str, Mean]
    """The table's extras, in percent."""


@dataclass(frozen=True)
class Difference:
    """J&F of a row minus that of the row it is compared with, on one split."""

    row: Row
    against: Row
    split: str
    paper: float | None
    over_seeds: Mean
    over_clips: Estimate

    @property
    def agrees(self) -> bool | None:
        """Whether ours has the paper's sign (no difference has none); None where the paper has no difference."""
        return None if not self.paper else self.over_seeds.value * self.paper > 0

    @property
    def significant(self) -> bool | None:
        """See the module's text; None with one seed or one clip."""
        if self.over_seeds.interval is None or self.over_clips.low is None:
            return None
        return all(low > 0 or high < 0 for low, high in
                   (self.over_seeds.interval, (self.over_clips.low, self.over_clips.high)))  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A table with what has finished of it."""

    table: Table
    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]
    """Evaluations that have not finished, as "row, seed"."""
    seeds: tuple[int, ...]
    """Asked for."""
    codes: tuple[str, ...]
    """Commits that the evaluations ran at."""
    seconds: float
    """All runs behind the table together, those shared with other tables included."""
    mini: bool


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation."""
    array = np.asarray(values, np.float64)
    return Mean(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def outcome(table: Table, finished: Mapping[tuple[str, int], Path], seeds: Sequence[int], seconds: float) -> Outcome:
    """Read what is there of a table.

    Args:
        table: its rows.
        finished: (evaluation, seed) -> folder of a finished evaluation.
        seeds: that were asked for.
        seconds: of all runs behind the table.

    Raises:
        DataError: an evaluation is damaged, or two were made on different data.
    """
    found = {
        (row.evaluation, seed): read_evaluation(finished[row.evaluation, seed], row.method)
        for row in table.rows
        for seed in seeds
        if (row.evaluation, seed) in finished
    }
    lines, differences = [], []
    base = table.rows[table.against]
    for row in table.rows:
        own = [found[row.evaluation, seed] for seed in seeds if (row.evaluation, seed) in found]
        lines += [_line(row, split, own, table) for split in table.splits if own]
        both = [
            (found[row.evaluation, seed], found[base.evaluation, seed])
            for seed in seeds
            if row is not base and (row.evaluation, seed) in found and (base.evaluation, seed) in found
        ]
        differences += [_difference(row, base, split, both, table.protocol) for split in table.splits if both]
    missing = [f"{r.method}, seed {s}" for r in table.rows for s in seeds if (r.evaluation, s) not in found]
    codes = sorted({str(e.fact("git", "unknown")) for e in found.values()})
    mini = any(e.is_mini for e in found.values())
    return Outcome(
        table, tuple(lines), tuple(differences), tuple(missing), tuple(seeds), tuple(codes), seconds, mini
    )  # fmt: skip


def _scores(evaluation: Evaluation, split: str, protocol: str) -> Mapping[str, Any]:
    try:
        return evaluation.metrics[split]["scores"][protocol]
    except KeyError as error:
        raise DataError(
            f"{evaluation.folder}: no scores of split {split} under protocol {protocol} ({error}). "
            "Remedy: evaluate again with the shipped configuration."
        ) from error


def _line(row: Row, split: str, own: Sequence[Evaluation], table: Table) -> Line:
    scores = [_scores(e, split, table.protocol) for e in own]
    means = {name: mean_of([s[name] for s in scores]) for name in SCORES}
    extras = {name: mean_of([e.metrics[split]["scores"][name] for e in own]) for name in table.extras}
    return Line(row, split, means, scores[0]["n"], extras)


def _difference(
    row: Row, base: Row, split: str, both: Sequence[tuple[Evaluation, Evaluation]], protocol: str
) -> Difference:
    points = mean_of(
        [_scores(ours, split, protocol)["J&F"] - _scores(theirs, split, protocol)["J&F"] for ours, theirs in both]
    )
    changes: dict[int, list[float]] = {}
    clips: dict[int, str] = {}
    for ours, theirs in both:
        for number in shared_rows(ours, theirs):
            one, other = ours.rows[number], theirs.rows[number]
            if one.split == split and one.jf is not None and other.jf is not None:
                changes.setdefault(number, []).append(one.jf - other.jf)
                clips[number] = one.audio
    if not changes:
        raise DataError(f"{both[0][0].folder}: no row of split {split} is shared with {both[0][1].folder}.")
    means = np.array([[float(np.mean(values))] for values in changes.values()])
    return Difference(
        row, base, split, _paper_difference(row, base, split), points, mean_intervals(means, list(clips.values()))[0]
    )


def _paper_difference(row: Row, base: Row, split: str) -> float | None:
    ours, theirs = row.paper.get(split), base.paper.get(split)
    if not ours or not theirs or ours[2] is None or theirs[2] is None:
        return None
    return round(ours[2] - theirs[2], 1)


def to_json(found: Outcome) -> dict[str, Any]:
    """The outcome as plain values, for other programs."""
    return json.loads(json.dumps({
        "table": found.table.number, "protocol": found.table.protocol, "seeds": found.seeds, "mini": found.mini,
        "missing": found.missing, "git": found.codes, "seconds": round(found.seconds, 1),
        "differences": [
            {"row": d.row.method, "against": d.against.method, "split": d.split, "paper": d.paper,
             "ours": d.over_seeds.value, "over_seeds": d.over_seeds.interval,
             "over_clips": (d.over_clips.low, d.over_clips.high), "agrees": d.agrees, "significant": d.significant}
            for d in found.differences
        ],
    }))  # fmt: skip
