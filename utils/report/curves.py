"""Training curves: rows of metrics.jsonl -> charts of matplotlib, for the page (SVG) and as pictures (PNG)."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from utils.errors import DataError
from utils.report.runs import read_log

Series = tuple[list[float], list[float]]
"""Optimiser steps, and a finite value at each."""
COLOURS = ("#2a78d6", "#d6552a", "#2a9d5c", "#8a4fd0", "#b8860b", "#c2417c", "#3d8f9e", "#6b6b6b")
"""One per run, in order; readable on light and dark grounds."""
INK, GRID = "#7a828b", "#8886"
FIGURES = {
    "figure_8.png": ("reward_all", "reward_class", "reward_iou", "reward_format"),
    "figure_9.png": ("completion_length", "group_std"),
    "figure_policy.png": (
        "entropy", "zero_variance_share", "clip_fraction", "kl", "grad_norm", "tokens_per_second", "reward_faithful",
    ),
}  # fmt: skip
"""Scalars of stage 3 by picture: the paper's Figures 8 and 9, and the state of the policy."""
CURVES = tuple(dict.fromkeys((
    *("loss", "ce_loss", "mask_loss", "mask_bce_loss", "mask_dice_loss", "distill_loss", "lr", "grad_norm"),
    *(name for names in FIGURES.values() for name in names),
)))  # fmt: skip
"""Scalars of metrics.jsonl that the page draws, where a run has them."""
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "aurora", "text.parse_math": False, "font.size": 8, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "text.color": INK, "grid.color": GRID,
    "grid.linewidth": 0.5, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10, "axes.titlelocation": "left",
}  # fmt: skip
"""Text stays text, equal curves give equal files, and a run's name is never read as a formula."""


def read_scalars(path: Path) -> dict[str, Series]:
    """The finite numbers of a metrics.jsonl by name. Raises DataError, see `runs.read_log`."""
    scalars: dict[str, Series] = {}
    for record in read_log(path):
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = scalars.setdefault(name, ([], []))
                steps.append(float(record["step"]))
                values.append(float(value))
    return scalars


def charts_of_runs(runs: Iterable[tuple[str, Path]], names: Sequence[str]) -> dict[str, dict[str, Series]]:
    """Scalar -> run -> what it logged; runs are (name, metrics.jsonl), and a scalar that no run logged is left out."""
    scalars = {name: read_scalars(path) for name, path in runs if path.exists()}
    charts = {title: {run: found[title] for run, found in scalars.items() if title in found} for title in names}
    return {title: lines for title, lines in charts.items() if lines}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start)."""
    return [sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(values))]


def draw_chart(axes: Axes, title: str, lines: Mapping[str, Series], names: Sequence[str], window: int | None) -> None:
    """One scalar of several runs: what was logged faintly, its running mean over it.

    The scale is logarithmic where positive values span more than two decades.

    Args:
        axes: to draw on.
        title: of the chart.
        lines: run -> steps and values, at least one of each.
        names: of all runs, which gives each its colour.
        window: values in a running mean; None = a fiftieth of them.
    """
    found = [value for _, values in lines.values() for value in values]
    logarithmic = min(found) > 0 and max(found) / min(found) > 100
    for name, (steps, values) in lines.items():
        colour = COLOURS[names.index(name) % len(COLOURS)]
        width = max(1, len(values) // 50) if window is None else window
        if width > 1:
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.6)
        point = "." if len(values) == 1 else None
        axes.plot(steps, smooth(values, width), color=colour, linewidth=1.4, marker=point, label=name)
    axes.set_title(title + " (log)" * logarithmic)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def chart_image(title: str, lines: Mapping[str, Series], names: Sequence[str]) -> dict[str, Any]:
    """A chart for the page: `src` (SVG as a data: address), `alt` for screen readers, `keys` [(run, colour)]."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        # Each point costs bytes in the page, and so do digits: 200 points, hundredths of a point of the picture.
        thinned = {name: _thin(series, 200) for name, series in lines.items()}
        draw_chart(figure.subplots(), title, thinned, names, None)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), buffer.getvalue())
    ends = ", ".join(f"{name} {values[0]:.3g} to {values[-1]:.3g}" for name, (_, values) in lines.items())
    return {
        "src": f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}",
        "alt": f"{title} over optimiser steps: {ends}",
        "keys": [(name, COLOURS[names.index(name) % len(COLOURS)]) for name in lines],
    }


def write_figures(runs: Sequence[tuple[str, Path]], folder: Path, window: int) -> list[Path]:
    """Write the PNG files of FIGURES for which a run has scalars; returns their paths.

    Args:
        runs: (name, metrics.jsonl).
        folder: of the files; it is made.
        window: logged rows in a running mean.

    Raises:
        DataError: a file is missing or cannot be read, or no run logged any scalar of stage 3.
    """
    for _, path in runs:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file. Remedy: name the folder of a run of grpo.")
    names, written = [name for name, _ in runs], []
    for file, wanted in FIGURES.items():
        charts = charts_of_runs(runs, wanted)
        if not charts:
            continue
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(4.5 * len(charts), 3.4), layout="constrained", dpi=150)
            for axes, (title, lines) in zip(np.ravel(figure.subplots(1, len(charts))), charts.items(), strict=True):
                draw_chart(axes, title, lines, names, window)
                axes.legend(fontsize=7, frameon=False)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / file)
            written.append(folder / file)
    if not written:
        raise DataError(f"{', '.join(names)}: no scalar of stage grpo was logged. Remedy: name runs of that stage")
    return written


def _thin(series: Series, most: int) -> Series:
    """Means of neighbouring points, at most `most` of them."""
    steps, values = series
    size = -(-len(values) // most)
    parts = [slice(i, i + size) for i in range(0, len(values), size)]
    return [steps[part][-1] for part in parts], [float(np.mean(values[part])) for part in parts]
