"""Plain-text tables of scores, as printed by train_ds_test.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | float | int | None


def text(value: Cell) -> str:
    """One cell: scores with two decimals, counts as they are, "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    written = f"{value:+.{digits}f}"
    return written[1:] if not float(written) else written


def format_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [list(header), *[[text(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = ["  ".join([row[0].ljust(widths[0]), *right[1:]]) for row, right in zip(cells, padded, strict=True)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def split_table(splits: Mapping[str, Mapping[str, Any]], protocols: Sequence[str]) -> str:
    """One line per split, and under it one per question kind where kinds are known; all scores in percent.

    Args:
        splits: name -> `scoring.score_split`.
        protocols: whose scores are shown; with several, each title names its own.
    """
    short = {protocol: "" if len(protocols) == 1 else f" {protocol[:3]}" for protocol in protocols}
    titles = [f"{name}{short[protocol]}" for protocol in protocols for name in ("J", "F", "J&F", "S")]
    rows: list[list[Cell]] = []
    for split, scores in splits.items():
        kinds = scores["kinds"] if len(scores["kinds"]) > 1 else {}
        for name, group in {split: scores, **{f"  {kind}": group for kind, group in kinds.items()}}.items():
            cells = [group[protocol].get(score) for protocol in protocols for score in ("J", "F", "J&F", "S")]
            rows.append([name, group["n"], *cells, group["class_accuracy"], group["format_share"], group["faithful"]])
    return format_table(["split", "n", *titles, "class", "format", "faithful"], rows)


def mix_scores(seen: Mapping[str, Any], unseen: Mapping[str, Any]) -> dict[str, float]:
    """The paper's "Mix (S+U)": the unweighted mean of test_s and test_u (Table 1), of the scores that both have."""
    return {name: (seen[name] + unseen[name]) / 2 for name in ("J", "F", "J&F") if name in seen and name in unseen}
