"""Sort mined failures into the paper's seven types (section 7.1) and draw them beside its Figure 4.

    python scripts/analyze_failures.py --data data/mini --failures runs/x/failures.jsonl --out runs/x/types.jsonl
    python scripts/analyze_failures.py --data data/refavs --failures ... --out ... --backend gemini --model ... --send

The mini world's labels come from rules (backend mini); elsewhere a backend names the type, as in correct_paths.py.
Beside --out: <out>.csv (counts by type, question kind and class) and <out>.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.annotate.command import add_options, check_options, execute, settings  # noqa: E402 - root on the path
from dataset.annotate.failures import read_failures  # noqa: E402
from dataset.annotate.prompts import read_template  # noqa: E402
from dataset.annotate.taxonomy import TYPES, classifier_judge, count_table  # noqa: E402
from dataset.cot import numbered_lines  # noqa: E402
from dataset.refavs import RefAvsIndex  # noqa: E402
from scripts.correct_paths import failure_requests  # noqa: E402
from utils.errors import AuroraError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="root of the data set")
    parser.add_argument("--failures", type=Path, required=True, help="JSONL of scripts/mine_failures.py")
    add_options(parser, "mini", expected_out=20)
    parser.set_defaults(mistakes=0.0)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        failures = read_failures(options.failures)[: options.limit]
        template = read_template("classify", options.template)
        requests = failure_requests(RefAvsIndex(options.data), failures, template)
        facts = settings(options, template, task="classify")
        status = execute(options, requests, facts, classifier_judge(), "classify")
        if options.out.is_file():
            write_table(options.out, {f.row: (f.kind, f.target) for f in failures})
        return status
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def write_table(path: Path, known: dict[int, tuple[str, str]]) -> None:
    """<path>.csv and <path>.png from the labelled rows."""
    labelled = [json.loads(text) for _, text in numbered_lines(path)]
    table = count_table((line["type"], *known[line["row"]]) for line in labelled)
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    draw(Path(f"{path}.png"), table, len(labelled))
    print(f"{len(labelled)} labelled: {path}.csv, {path}.png")


def draw(path: Path, table: list[dict], total: int) -> None:
    """Share of each type, ours beside the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(table))
    for offset, share, count, label in (
        (-0.2, "percent", "count", f"this run ({total})"),
        (0.2, "paper_percent", "paper_count", f"paper, Figure 4 ({sum(t.paper for t in TYPES)})"),
    ):
        bars = axes.bar([p + offset for p in places], [line[share] for line in table], 0.4, label=label)
        axes.bar_label(bars, [str(line[count]) for line in table], fontsize=8)
    axes.set_xticks(list(places), [t.title.replace(" ", "\n") for t in TYPES], fontsize=7)
    axes.set_ylabel("% of failures")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
