"""Training curves: rows of metrics.jsonl -> line charts as inline SVG, without any plotting library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 24
COLOURS = ("#2a78d6", "#d6552a", "#2a9d5c", "#8a4fd0", "#b8860b", "#c2417c", "#3d8f9e", "#6b6b6b")
"""One per series, in order; readable on light and dark grounds."""

GRPO_FIGURES = {
    "figure_8.png": ("reward_all", "reward_class", "reward_iou", "reward_format"),
    "figure_9.png": ("completion_length", "group_std"),
    "figure_policy.png": (
        "entropy", "zero_variance_share", "clip_fraction", "kl", "grad_norm", "tokens_per_second", "reward_faithful",
    ),
}  # fmt: skip
"""Scalars of stage 3 by picture: the paper's Figures 8 and 9, and the state of the policy."""


@dataclass(frozen=True)
class Series:
    """One line: finite values over optimiser steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """One scalar of several runs."""

    title: str
    series: tuple[Series, ...]


def read_scalars(path: Path) -> dict[str, Series]:
    """The numeric fields of a metrics.jsonl by name. Non-finite values and a truncated last line are left out.

    Raises:
        ValueError: for a line other than the last that is not a JSON object with a `step`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object with a step ({error})") from error
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                points.setdefault(name, []).append((step, float(value)))
    return {name: Series(name, *map(tuple, zip(*found, strict=True))) for name, found in points.items()}


def charts_of_runs(runs: Iterable[tuple[str, Path]], names: Sequence[str]) -> list[Chart]:
    """One chart per scalar name, one line per run that logged it; runs are (label, metrics.jsonl) pairs."""
    scalars = [(label, read_scalars(path)) for label, path in runs if path.exists()]
    charts = []
    for name in names:
        found = [Series(label, s[name].steps, s[name].values) for label, s in scalars if name in s]
        if found:
            charts.append(Chart(name, tuple(found)))
    return charts


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start)."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def colour_of(name: str, names: Sequence[str]) -> str:
    """The same colour for the same name in every chart of a page."""
    return COLOURS[names.index(name) % len(COLOURS)]


def svg(chart: Chart, names: Sequence[str]) -> str:
    """An accessible inline SVG of `chart`; a logarithmic scale where positive values span more than two decades.

    Args:
        chart: with at least one point.
        names: of all series of the page, which gives each its colour.
    """
    values = [v for series in chart.series for v in series.values]
    steps = [s for series in chart.series for s in series.steps]
    logarithmic = min(values) > 0 and max(values) / min(values) > 100
    low, high = _range(min(values), max(values), logarithmic)
    last = max(max(steps), 1.0)

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / last

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    parts = [f'<text class="t" x="{_LEFT}" y="14">{escape(chart.title)}{" (log)" if logarithmic else ""}</text>']
    for value in _ticks(low, high, logarithmic):
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in (0, last / 2, last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:.0f}</text>')
    for series in chart.series:
        shown = smooth(series.values, max(1, len(series.values) // 50))
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(series.steps, shown, strict=True))
        colour = colour_of(series.name, names)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points}"/>')
    label = f"{chart.title} over optimiser steps: " + ", ".join(
        f"{s.name} {s.values[0]:.3g} to {s.values[-1]:.3g}" for s in chart.series
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )


def _range(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        return low / 1.1, high * 1.1
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        powers = [10.0**e for e in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
        tens = [value for value in powers if value >= low]
        return tens if len(tens) > 3 else [m * p for p in powers for m in (1, 2, 5) if low <= m * p <= high]
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
