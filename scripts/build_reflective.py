"""Corrections -> reflective paths for stage 2 (paper section 3.2, eq. 3).

python scripts/build_reflective.py --corrections runs/sft/corrections.jsonl --out data/refavs/cot/reflective.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.cot import numbered_lines  # noqa: E402 - the project's root must be on the path first
from dataset.reflective import build_path, write_reflective  # noqa: E402
from utils.errors import AuroraError, DataError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corrections", type=Path, required=True, help="JSONL of scripts/correct_paths.py")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--seed", type=int, default=0, help="of the triggers (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
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
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_reflective(options.out, paths)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"{len(paths)} reflective paths: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
