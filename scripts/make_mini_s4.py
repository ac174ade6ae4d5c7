"""Write scenes of the mini world in the layout of AVSBench S4, for Table 6 at mini size (`dataset.mini.s4`).

    python scripts/make_mini_s4.py --out data/mini_s4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.avsbench import SPLITS  # noqa: E402 - the project's root must be on the path first
from dataset.mini.s4 import make_mini_s4  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/mini_s4"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    for split, count in zip(SPLITS, (100, 20, 150), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help="clips (default: %(default)s)")
    options = parser.parse_args(arguments)
    make_mini_s4(options.out, {split: getattr(options, split) for split in SPLITS}, options.seed)
    print(f"{options.out}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
