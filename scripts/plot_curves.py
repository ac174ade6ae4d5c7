"""Draw the training curves of stage 3 as the paper's Figures 8 and 9, from one or several runs.

    python scripts/plot_curves.py reflective=runs/grpo no_stage_2=runs/grpo_sft --out curves [--window 10]

A run is a folder with metrics.jsonl; a name may stand before it. Writes figure_8.png (overall, class, IoU and format
reward) and figure_9.png (reasoning length, intra-group std), and, where they were logged, figure_policy.png (entropy,
share of groups without variance, clip fraction, KL, gradient norm, tokens per second, share of right reasoning). The
faint line is what was logged, the strong one its running mean. The HTML report draws the same scalars.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.curves import COLOURS, GRPO_FIGURES, Series, read_scalars, smooth  # noqa: E402 - the root must be on the path first
from utils.errors import AuroraError, DataError  # noqa: E402

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 40, 56
FONT = cv2.FONT_HERSHEY_SIMPLEX
INK, GRID = (70, 70, 70), (225, 225, 225)


def named_run(text: str) -> tuple[str, Path]:
    """`name=folder` or `folder`, which is then named by its last part.

    Raises:
        DataError: there is no metrics.jsonl.
    """
    name, _, folder = text.rpartition("=")
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Remedy: name the folder of a run of stage grpo")
    return name or Path(folder).resolve().name, path


def bgr(colour: str) -> tuple[int, int, int]:
    """'#rrggbb' as OpenCV orders it."""
    return int(colour[5:7], 16), int(colour[3:5], 16), int(colour[1:3], 16)


def draw_panel(title: str, lines: Sequence[Series], names: Sequence[str], window: int) -> np.ndarray:
    """One scalar of all runs: uint8 [HEIGHT,WIDTH,3] BGR."""
    panel = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    values = [v for line in lines for v in line.values]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    low, high = low - margin, high + margin
    last = max(max(line.steps) for line in lines) or 1.0

    def points(steps: Sequence[float], heights: Sequence[float]) -> np.ndarray:
        x = LEFT + (WIDTH - LEFT - RIGHT) * np.asarray(steps) / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (np.asarray(heights) - low) / (high - low)
        return np.stack([x, y], 1).round().astype(np.int32)[:, None]

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = low + share * (high - low)
        ends = points([0, last], [height, height])
        cv2.line(panel, ends[0, 0].tolist(), ends[1, 0].tolist(), GRID, 1, cv2.LINE_AA)
        cv2.putText(panel, f"{height:.3g}", (8, int(ends[0, 0, 1]) + 4), FONT, 0.42, INK, 1, cv2.LINE_AA)
        x = int(points([share * last], [low])[0, 0, 0])
        cv2.putText(panel, f"{share * last:.4g}", (x - 8, HEIGHT - BOTTOM + 18), FONT, 0.42, INK, 1, cv2.LINE_AA)
    for line in lines:
        colour = bgr(COLOURS[names.index(line.name) % len(COLOURS)])
        faint = tuple(int(255 - (255 - c) * 0.3) for c in colour)
        cv2.polylines(panel, [points(line.steps, line.values)], False, faint, 1, cv2.LINE_AA)
        cv2.polylines(panel, [points(line.steps, smooth(line.values, window))], False, colour, 2, cv2.LINE_AA)
    cv2.putText(panel, title, (LEFT, 24), FONT, 0.58, (30, 30, 30), 1, cv2.LINE_AA)
    x = LEFT
    for name in (line.name for line in lines):
        colour = bgr(COLOURS[names.index(name) % len(COLOURS)])
        cv2.line(panel, (x, HEIGHT - 14), (x + 18, HEIGHT - 14), colour, 2, cv2.LINE_AA)
        cv2.putText(panel, name, (x + 24, HEIGHT - 10), FONT, 0.42, INK, 1, cv2.LINE_AA)
        x += 40 + cv2.getTextSize(name, FONT, 0.42, 1)[0][0]
    return panel


def plot(runs: Sequence[tuple[str, Path]], folder: Path, window: int) -> list[Path]:
    """Write the figures for which a run has scalars; returns their paths.

    Raises:
        DataError: no run logged any scalar of stage 3.
    """
    names = [name for name, _ in runs]
    scalars = [(name, read_scalars(path)) for name, path in runs]
    written = []
    for file, wanted in GRPO_FIGURES.items():
        panels = []
        for scalar in wanted:
            lines = [Series(name, s[scalar].steps, s[scalar].values) for name, s in scalars if scalar in s]
            if lines:
                panels.append(draw_panel(scalar, lines, names, window))
        if panels:
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / file), np.concatenate(panels, axis=1))
            written.append(folder / file)
    if not written:
        raise DataError(f"{', '.join(names)}: no scalar of stage grpo was logged. Remedy: name runs of that stage")
    return written


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--window", type=int, default=10, help="logged rows in the running mean")
    options = parser.parse_args(arguments)
    try:
        for path in plot([named_run(text) for text in options.runs], options.out, options.window):
            print(path)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
