"""The quickstart's results as one summary.json and one page, index.html, from what its steps left in a folder.

python scripts/summarise.py --out runs/quickstart [--seed 0] [--num_gpus 1] [--full]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.gallery import media_of  # noqa: E402 - the project's root must be on the path first
from utils.config import git_state  # noqa: E402
from utils.errors import run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.report.page import write_report  # noqa: E402
from utils.report.runs import find_evaluations, probe_summaries, stage_summary, summary_table  # noqa: E402

TRAINED = ("teacher", "sft", "reflective", "grpo")
EVALUATED = ("sft", "teacher", "reflective", "grpo")
FULL = ("sft_plain", "sft_without_null")
PROBES = ("shuffle_audio", "shuffle_video")
PICTURED = ("eval_sft", "eval_grpo")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the training, to be noted")
    parser.add_argument("--num_gpus", type=int, default=1, help="processes of the training, to be noted")
    parser.add_argument("--full", action="store_true", help="with the stages of --full")
    options = parser.parse_args(arguments)
    return run_command(lambda: print(summary_table(summarise(options))))


def summarise(options: argparse.Namespace) -> dict[str, Any]:
    """Write summary.json and index.html; returns the summary. `total` counts time shared by several steps once."""
    out, more = options.out, FULL if options.full else ()
    spans = {path.name: span for path in sorted((out / "steps").iterdir()) if (span := _span(path)) is not None}
    times = {name: end - begin for name, (begin, end) in spans.items()}
    summary = {
        "stages": {stage: stage_summary(out / f"eval_{stage}") for stage in (*EVALUATED, *more)},
        "probes": probe_summaries((p, "sft", f"eval_sft_{p}", out / f"eval_sft_{p}") for p in PROBES),
        "seconds": {name: round(value, 1) for name, value in {**times, "total": elapsed(spans.values())}.items()},
        "config": {"folder": "configs/mini", "seed": options.seed, "num_gpus": options.num_gpus, "full": options.full},
        "git": git_state(),
    }
    write_json(out / "summary.json", summary)
    found = find_evaluations(out)
    write_report(
        out / "index.html", "AURORA on the mini world", found,
        summary=summary, runs=[(name, out / name) for name in (*TRAINED, *more)],
        media={"refavs": media_of("refavs", "data/mini")}, shown=[e for e in found if e.folder.name in PICTURED],
    )  # fmt: skip
    return summary


def _span(path: Path) -> tuple[float, float] | None:
    """Begin and end of a step in seconds since 1970, from its stamp's second line; None for other files."""
    lines = [] if path.suffix == ".log" else path.read_text(encoding="utf-8").splitlines()
    if len(lines) != 2:
        return None
    begin, end = map(float, lines[1].split())
    return begin, end


def elapsed(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the (begin, end) was going on."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    sys.exit(main())
