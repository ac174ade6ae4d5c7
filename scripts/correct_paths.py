"""Correct mined failures with a stronger model (paper sections 3.2 and 6.2).

    python scripts/correct_paths.py --data data/mini --failures runs/engine/failures.jsonl \\
        --out runs/engine/corrections.jsonl --backend mini
    GEMINI_API_KEY=... python scripts/correct_paths.py --data data/refavs --failures runs/sft/failures.jsonl \\
        --out runs/sft/corrections.jsonl --model gemini-2.5-pro --per-minute 60 \\
        --price-in <USD> --price-out <USD> --max-cost 25 --send

Without --send nothing leaves this machine: the estimate of tokens and price is printed. Accepted rows go to --out, the
others ("right", refused, blocked) to <out>.refused.jsonl. Exit status as in scripts/generate_cot.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.annotate.correction import correction_gate  # noqa: E402 - the project's root must be on the path first
from dataset.annotate.engine import add_options, annotate, check_options  # noqa: E402
from dataset.annotate.failures import failure_requests, read_failures  # noqa: E402
from dataset.annotate.prompts import read_template  # noqa: E402
from dataset.refavs import RefAvsIndex  # noqa: E402
from utils.errors import run_command  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="root of the data set")
    parser.add_argument("--failures", type=Path, required=True, help="JSONL of scripts/mine_failures.py")
    parser.add_argument("--max-ratio", type=float, default=0.6, help="largest edit ratio (default: %(default)s)")
    add_options(parser, "gemini", expected_out=600)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return run_command(lambda: correct(options))


def correct(options: argparse.Namespace) -> int:
    """Ask for the corrections; returns the exit status."""
    template = read_template("correct", options.template)
    failures = read_failures(options.failures)[: options.limit]
    requests = failure_requests(RefAvsIndex(options.data), failures, template)
    gate = correction_gate(options.max_ratio)
    return annotate(options, requests, gate, template, "correct", max_ratio=options.max_ratio)


if __name__ == "__main__":
    sys.exit(main())
