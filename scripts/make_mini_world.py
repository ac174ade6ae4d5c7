"""Write the mini world (the embedded default data) in the official Ref-AVS layout.

python scripts/make_mini_world.py --out data/mini
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.mini.world import WorldSettings, make_mini_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/mini"), help="folder to write (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    for setting in fields(WorldSettings):
        flag = "--" + setting.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=setting.default, help="default: %(default)s")
    arguments = parser.parse_args()
    settings = WorldSettings(**{f.name: getattr(arguments, f.name) for f in fields(WorldSettings)})
    make_mini_world(arguments.out, settings, arguments.workers)
    print(f"{arguments.out}: ready")


if __name__ == "__main__":
    main()
