"""How much of a Ref-AVS score the references alone give away (null rows above all): a baseline that reads text only.

    python scripts/text_baseline.py --data data/refavs

Learns from the training rows of metadata.csv and judges the other splits, with the final full stop of the references
and without it. No media are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.refavs import RefAvsIndex, Split  # noqa: E402 - the project's root must be on the path first
from dataset.text_baseline import TextBaseline  # noqa: E402
from utils.errors import AuroraError, DataError  # noqa: E402
from utils.results import write_json  # noqa: E402
from utils.tables import Cell, format_table  # noqa: E402

JUDGED = (Split.VAL, Split.TEST_S, Split.TEST_U, Split.TEST_N)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    try:
        index = RefAvsIndex(options.data)
        learned = index.rows(Split.TRAIN)
        if not learned:
            raise DataError(f"{index.table}: no row of split train. Remedy: use the whole table.")
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    table: list[list[Cell]] = []
    kept: dict[str, dict[str, object]] = {}
    for full_stop in (True, False):
        baseline = TextBaseline(learned, full_stop)
        name = "with the final stop" if full_stop else "without it"
        kept[name] = {}
        for split in JUDGED:
            scores = baseline.score(index.rows(split))
            kept[name][str(split)] = asdict(scores)
            table.append([f"{split}, {name}", *asdict(scores).values()])
    print(format_table(["split", "rows", "null", "null found", "null claimed", "class", "S"], table))
    print("percent; S of a model that trusts this baseline and marks every pixel of the other clips (100: no help)")
    if options.json is not None:
        write_json(options.json, {"data": str(options.data), "learned": len(learned), "scores": kept})
    return 0


if __name__ == "__main__":
    sys.exit(main())
