"""Write the reasoning of every training row (paper sections 3.1 and 6.1), or import the released lists.

    python scripts/generate_cot.py --data data/mini --out runs/engine/train.jsonl                 # the mini world's own
    python scripts/generate_cot.py --data data/refavs --out data/refavs/cot/train.jsonl --send \\
        --backend openai --model Qwen/Qwen2.5-Omni-7B --base-url http://localhost:8000/v1 --concurrency 32
    python scripts/generate_cot.py --data data/refavs --out data/refavs/cot/train.jsonl --import-published train.json

A run that was interrupted continues when the same command is given again. Exit status: 0 complete, 1 error, 3 rows are
open (the service failed), 4 ended by the cost limit or by the service.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.annotate.backends import Request, choose_frames  # noqa: E402 - the project's root must be on the path first
from dataset.annotate.engine import add_options, annotate, check_options  # noqa: E402
from dataset.annotate.gates import reasoning_gate  # noqa: E402
from dataset.annotate.prompts import WRITER_FRAMES, fill, read_template  # noqa: E402
from dataset.records import write_records  # noqa: E402
from dataset.refavs import RefAvsIndex, Split  # noqa: E402
from dataset.released import import_reasoning  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="root of the data set")
    parser.add_argument("--split", default="train", choices=[str(s) for s in Split], help="default: %(default)s")
    parser.add_argument("--style", choices=("flexible", "fixed"), default="flexible", help="paper section 8.2")
    parser.add_argument("--import-published", type=Path, help="released positional JSON list, checked and converted")
    add_options(parser, "mini", expected_out=200)
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return run_command(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    """Ask for the paths, or convert the published ones; returns the exit status."""
    index = RefAvsIndex(options.data)
    if options.import_published is not None:
        return convert(options, index)
    template = read_template(f"cot_{options.style}", options.template)
    requests = [
        Request(
            row,
            fill(template, reference=row.reference, target=row.class_name),
            choose_frames(index, row.clip, WRITER_FRAMES),
            index.audio_path(row.clip),
        )
        for row in index.rows(options.split)[: options.limit]
    ]
    own = {"style": options.style, "split": options.split}
    return annotate(options, requests, reasoning_gate(options.style), template, "write", **own)


def convert(options: argparse.Namespace, index: RefAvsIndex) -> int:
    """The released list as JSONL keyed by row; as many elements as the split has rows."""
    if options.out.exists():
        raise DataError(f"{options.out}: exists. Remedy: name another --out.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    records = import_reasoning(options.import_published, index, Split(options.split), too_long="drop")
    write_records(options.out, records)
    total = len(index.rows(options.split))
    print(f"{total} elements, {len(records)} written, {total - len(records)} too long: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
