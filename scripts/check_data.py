"""Is this copy of Ref-AVS sound? Reads everything once, in parallel; reports and advises, and never changes a file.

    python scripts/check_data.py --data data/refavs                         # table, reasoning records, all media
    python scripts/check_data.py --data data/refavs --metadata-only         # the table alone, seconds
    python scripts/check_data.py --data data/refavs --cot cot/a.jsonl --json report.json

Reasoning records in DATA/cot/train*.jsonl are read unless --cot names others. Exit status: 0 nothing wrong (warnings
and notes may stand), 1 errors, 2 the check itself could not run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import DataConfig  # noqa: E402 - the project's root must be on the path first
from dataset.doctor import ERROR, KINDS, NOTE, WARNING, Report, check_reasoning, check_table  # noqa: E402
from dataset.refavs import Split  # noqa: E402
from utils.errors import run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.progress import counted  # noqa: E402
from utils.tables import format_table  # noqa: E402

SHOWN = 20
"""Findings that are printed in words without --all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv, media/ and gt_mask/")
    parser.add_argument("--cot", type=Path, nargs="*", help="JSONL files (default: DATA/cot/train*.jsonl)")
    parser.add_argument("--metadata-only", action="store_true", help="table and reasoning records, no media")
    parser.add_argument("--json", type=Path, help="write every finding to this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="reading processes; 0 = this one")
    parser.add_argument("--max-image-pixels", type=int, default=defaults.max_image_pixels)
    parser.add_argument("--max-audio-seconds", type=float, default=defaults.max_audio_seconds)
    parser.add_argument("--all", action="store_true", help="print every finding, not only the first ones")
    options = parser.parse_args(arguments)
    return run_command(lambda: check(options), failed=2)


def check(options: argparse.Namespace) -> int:
    """Print what was found; returns 1 where something is wrong."""
    report = examine(options)
    if options.json is not None:
        write_json(options.json, report.to_json())
    show(report, everything=options.all)
    return 1 if report.of(ERROR) else 0


def examine(options: argparse.Namespace) -> Report:
    """All checks that the options ask for."""
    report = Report(str(options.data))
    began = time.perf_counter()
    index, found = check_table(options.data)
    report.findings += found
    report.checked["rows"] = index.row_count
    report.seconds["table"] = time.perf_counter() - began
    records = options.cot if options.cot is not None else sorted((options.data / "cot").glob("train*.jsonl"))
    if records:
        began = time.perf_counter()
        report.findings += check_reasoning(records, index, Split.TRAIN)
        report.seconds["reasoning"] = time.perf_counter() - began
    if not options.metadata_only:
        from dataset.doctor_media import Limits, check_media  # imports the decoders

        began = time.perf_counter()
        limits = Limits(options.max_image_pixels, options.max_audio_seconds)
        found, checked = check_media(index, limits, options.workers, partial(counted, name="media", unit="clips"))
        report.findings += found
        report.checked |= checked
        report.seconds["media"] = time.perf_counter() - began
    return report


def show(report: Report, everything: bool) -> None:
    """Table by kind, findings in words, advice."""
    rows = report.table()
    if rows:
        print(format_table(["", "count", "finding", "first"], [[s, n, kind, place] for s, kind, n, place in rows]))
    told = [f for f in report.findings if f.severity != NOTE or everything]
    for finding in told if everything else told[:SHOWN]:
        print(f"{finding.severity}: {finding.kind}: {finding.where}: {finding.text}")
    if not everything and len(told) > SHOWN:
        print(f"and {len(told) - SHOWN} more (--all, --json)")
    for severity, kind, _, _ in rows:
        if severity != NOTE:
            print(f"advice on {kind!r}: {KINDS[kind][1]}")
    read = ", ".join(f"{count:,} {name}" for name, count in report.checked.items())
    counts = ", ".join(f"{s}s: {len(report.of(s))}" for s in (ERROR, WARNING, NOTE))
    print(f"{read} read in {sum(report.seconds.values()):.1f} s; {counts}")


if __name__ == "__main__":
    sys.exit(main())
