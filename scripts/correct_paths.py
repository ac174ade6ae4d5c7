"""Correct mined failures with a stronger model (paper sections 3.2 and 6.2).

    python scripts/correct_paths.py --data data/mini --failures runs/engine/failures.jsonl \\
        --out runs/engine/corrections.jsonl --backend mini
    GEMINI_API_KEY=... python scripts/correct_paths.py --data data/refavs --failures runs/sft/failures.jsonl \\
        --out runs/sft/corrections.jsonl --model gemini-2.5-pro --per-minute 60 \\
        --price-in <USD> --price-out <USD> --max-usd 25 --send

Without --send nothing leaves this machine: the estimate of tokens and price is printed. Accepted rows go to --out, the
others ("right", refused, blocked) to <out>.refused.jsonl. Exit status as in scripts/generate_cot.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.annotate.backend import Request, choose_frames  # noqa: E402 - the project's root must be on the path first
from dataset.annotate.command import add_options, check_options, execute, settings  # noqa: E402
from dataset.annotate.correction import corrector_judge  # noqa: E402
from dataset.annotate.failures import Failure, read_failures  # noqa: E402
from dataset.annotate.prompts import CORRECTOR_FRAMES, fill, read_template  # noqa: E402
from dataset.refavs import RefAvsIndex, Row  # noqa: E402
from dataset.reflective import without_seg  # noqa: E402
from utils.errors import AuroraError, DataError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="root of the data set")
    parser.add_argument("--failures", type=Path, required=True, help="JSONL of scripts/mine_failures.py")
    parser.add_argument("--max-ratio", type=float, default=0.6, help="largest edit ratio (default: %(default)s)")
    add_options(parser, "gemini", expected_out=600)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        index = RefAvsIndex(options.data)
        template = read_template("correct", options.template)
        requests = failure_requests(index, read_failures(options.failures)[: options.limit], template)
        facts = settings(options, template, task="correct", max_ratio=options.max_ratio)
        return execute(options, requests, facts, corrector_judge(options.max_ratio), "correct")
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def failure_requests(index: RefAvsIndex, failures: list[Failure], template: str) -> list[Request]:
    """Ten frames, sound and prompt for each failure.

    Raises:
        DataError: a failure is about a row that the metadata does not have, or has under another uid.
    """
    return [
        Request(
            row := known_row(index, failure),
            fill(template, reference=row.reference, target=row.class_name, wrong=without_seg(failure.path)),
            choose_frames(index, row.clip, CORRECTOR_FRAMES),
            index.audio_path(row.clip),
            wrong=failure.path,
        )
        for failure in failures
    ]


def known_row(index: RefAvsIndex, failure: Failure) -> Row:
    """The metadata row of a failure."""
    row = index.row(failure.row)
    if row is None or row.uid != failure.uid:
        raise DataError(
            f"row {failure.row} is {row and row.uid!r} in {index.root}, {failure.uid!r} in the failures. "
            "Remedy: mine with this metadata.csv."
        )
    return row


if __name__ == "__main__":
    sys.exit(main())
