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

from dataset.cot import numbered_lines  # noqa: E402 - the project's root must be on the path first
from dataset.refavs import RefAvsIndex  # noqa: E402
from dataset.reflective import ReflectivePath, build_path, write_reflective  # noqa: E402
from dataset.reflective_import import import_reflective  # noqa: E402
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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_reflective(options.out, paths)
    print(f"{len(paths)} reflective paths: {options.out}")


def imported(options: argparse.Namespace) -> list[ReflectivePath]:
    """What the released list holds; the rows that cannot be split are counted by reason, and named."""
    found = import_reflective(options.import_published, RefAvsIndex(options.data))
    for reason, count in Counter(reason for _, reason in found.left).most_common():
        rows = [row for row, why in found.left if why == reason]
        more = ", ..." if count > SHOWN else ""
        print(f"not split, {count}: {reason} (rows {', '.join(map(str, rows[:SHOWN]))}{more})")
    if not found.paths:
        raise DataError(f"{options.import_published}: no text could be split. Remedy: see the reasons above.")
    return found.paths


def corrected(options: argparse.Namespace) -> list[ReflectivePath]:
    """Paths of the corrector's records."""
    paths = []
    for line, text in numbered_lines(options.corrections, "run scripts/correct_paths.py"):
        try:
            record = json.loads(text)
            names = ("row", "uid", "target", "wrong", "corrected")
            paths.append(build_path(*(record[name] for name in names), seed=options.seed))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{options.corrections}, line {line}: {error!r}. Remedy: run scripts/correct_paths.py again."
            ) from error
    twice = [row for row, count in Counter(p.row for p in paths).items() if count > 1]
    if twice:
        raise DataError(f"{options.corrections}: row {twice[0]} stands twice. Remedy: keep one of the lines.")
    return paths


if __name__ == "__main__":
    sys.exit(main())
