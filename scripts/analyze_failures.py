"""Sort mined failures into the paper's seven types (section 7.1) and draw them beside its Figure 4.

    python scripts/analyze_failures.py --data data/mini --failures runs/x/failures.jsonl --out runs/x/types.jsonl
    python scripts/analyze_failures.py --data data/refavs --failures ... --out ... --backend gemini --model ... --send

The mini world's labels come from rules (backend mini); elsewhere a backend names the type, as in correct_paths.py.
Beside --out: <out>.csv (counts by type, question kind and class) and <out>.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.annotate.engine import add_options, annotate, check_options  # noqa: E402 - root on the path
from dataset.annotate.failures import failure_requests, read_failures  # noqa: E402
from dataset.annotate.prompts import read_template  # noqa: E402
from dataset.annotate.taxonomy import type_gate, write_table  # noqa: E402
from dataset.refavs import RefAvsIndex  # noqa: E402
from utils.errors import run_command  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="root of the data set")
    parser.add_argument("--failures", type=Path, required=True, help="JSONL of scripts/mine_failures.py")
    add_options(parser, "mini", expected_out=20)
    parser.set_defaults(mistakes=0.0)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return run_command(lambda: classify(options))


def classify(options: argparse.Namespace) -> int:
    """Ask for the types and print their table; returns the exit status."""
    failures = read_failures(options.failures)[: options.limit]
    template = read_template("classify", options.template)
    requests = failure_requests(RefAvsIndex(options.data), failures, template)
    status = annotate(options, requests, type_gate, template, "classify")
    if options.out.is_file():
        print(write_table(options.out, {f.row: (f.kind, f.target) for f in failures}))
    return status


if __name__ == "__main__":
    sys.exit(main())
