"""Corrections -> reflective paths for stage 2 (paper section 3.2, eq. 3).

    python scripts/build_reflective.py --corrections runs/sft/corrections.jsonl --out data/refavs/cot/reflective.jsonl
    python scripts/build_reflective.py --import-published FILE --data data/refavs --out ...   (the released list)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.records import CotRecord, build_path, numbered_lines, write_records  # noqa: E402 - root on the path first
from dataset.refavs import RefAvsIndex  # noqa: E402
from dataset.released import import_reflective  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402

SHOWN = 10
"""Rows named for each reason."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corrections", type=Path, help="JSONL of scripts/correct_paths.py")
    source.add_argument("--import-published", type=Path, help="released JSON list of finished texts, to be split")
    parser.add_argument("--data", type=Path, help="root of the data set, for --import-published")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--seed", type=int, default=0, help="of the triggers (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.import_published and not options.data:
        parser.error("--import-published joins the texts with metadata rows: give --data too")
    return run_command(lambda: build(options))


def build(options: argparse.Namespace) -> None:
    """Write what was asked for."""
    paths = imported(options) if options.import_published else corrected(options)
    write_records(options.out, paths)
    print(f"{len(paths)} reflective paths: {options.out}")


def imported(options: argparse.Namespace) -> list[CotRecord]:
    """What the released list holds; the rows that cannot be split are counted by reason, and named."""
    paths, left = import_reflective(options.import_published, RefAvsIndex(options.data))
    for reason, count in Counter(reason for _, reason in left).most_common():
        rows = [row for row, why in left if why == reason]
        more = ", ..." if count > SHOWN else ""
        print(f"not split, {count}: {reason} (rows {', '.join(map(str, rows[:SHOWN]))}{more})")
    if not paths:
        raise DataError(f"{options.import_published}: no text could be split. Remedy: see the reasons above.")
    return paths


def corrected(options: argparse.Namespace) -> list[CotRecord]:
    """Paths of the corrector's records."""
    paths: dict[int, CotRecord] = {}
    for line, text in numbered_lines(options.corrections, "run scripts/correct_paths.py"):
        where = f"{options.corrections}, line {line}"
        try:
            record = json.loads(text)
            names = ("row", "uid", "target", "wrong", "corrected")
            path = build_path(*(record[name] for name in names), seed=options.seed)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{where}: {error!r}. Remedy: run scripts/correct_paths.py again.") from error
        if path.row in paths:
            raise DataError(f"{where}: row {path.row} stands twice. Remedy: keep one of the lines.")
        paths[path.row] = path
    return list(paths.values())


if __name__ == "__main__":
    sys.exit(main())
