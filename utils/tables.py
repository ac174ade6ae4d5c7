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


def score_cells(scores: Mapping[str, Any], protocols: Sequence[str]) -> list[Cell]:
    """The cells of one group of rows in the order of `score_header`."""
    cells: list[Cell] = [scores["n"]]
    for protocol in protocols:
        cells += [scores[protocol].get(name) for name in ("J", "F", "J&F", "S")]
    return [*cells, scores["class_accuracy"], scores["format_share"], scores["faithful"]]


def score_header(first: str, protocols: Sequence[str]) -> list[str]:
    """Column titles; with several protocols each title names its own."""
    short = {protocol: "" if len(protocols) == 1 else f" {protocol[:3]}" for protocol in protocols}
    names = [f"{name}{short[protocol]}" for protocol in protocols for name in ("J", "F", "J&F", "S")]
    return [first, "n", *names, "class", "format", "faithful"]


def split_table(splits: Mapping[str, Mapping[str, Any]], protocols: Sequence[str]) -> str:
    """One line per split, and under it one per question kind where kinds are known; all scores in percent."""
    rows: list[list[Cell]] = []
    for name, scores in splits.items():
        rows.append([name, *score_cells(scores, protocols)])
        kinds = scores["kinds"] if len(scores["kinds"]) > 1 else {}
        rows += [[f"  {kind}", *score_cells(group, protocols)] for kind, group in kinds.items()]
    return format_table(score_header("split", protocols), rows)


def mix_scores(seen: Mapping[str, Any], unseen: Mapping[str, Any]) -> dict[str, float]:
    """The paper's "Mix (S+U)": the unweighted mean of test_s and test_u (Table 1)."""
    return {name: (seen[name] + unseen[name]) / 2 for name in ("J", "F", "J&F")}
