"""One HTML page about evaluations: results beside the paper's, breakdowns with intervals, comparisons, every clip.

    python scripts/report.py runs/quickstart
    python scripts/report.py before=runs/sft/eval after=runs/grpo/eval --out runs/report.html --data data/refavs

A run is a folder of train_ds_test.py (<split>/metrics.json) or one that holds such folders, up to two levels below;
training curves (metrics.jsonl) and failure types (<x>.jsonl.csv of scripts/analyze_failures.py) in it are shown too.
Writes the page and, beside it, the folder <page>_files with pictures and sounds, which a browser loads when they are
looked at. Move or publish both together. scripts/check_report.py looks at a page in a real browser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import AuroraError, DataError  # noqa: E402 - the project's root must be on the path first
from utils.report_media import WIDTH, MediaSource  # noqa: E402
from utils.report_runs import Evaluation, find_evaluations  # noqa: E402
from utils.summary import run_summary, write_report  # noqa: E402

BENCHMARKS = ("refavs=", "avsbench_s4=", "avsbench_ms3=")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders; a name is put before its evaluations")
    parser.add_argument("--out", type=Path, help="page (default: report.html in the first run)")
    parser.add_argument("--data", action="append", default=[], metavar="[BENCHMARK=]ROOT",
                        help="root of the data (default: what the evaluations name)")
    parser.add_argument("--title", default="AURORA: evaluation report", help="heading (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, action="append", metavar=("BEFORE", "AFTER"),
                        help="two evaluations by name, may be repeated (default: each with the one before it)")
    parser.add_argument("--rows", type=int, help="at most this many clips, evenly spread (default: all)")
    parser.add_argument("--width", type=int, default=WIDTH, help="pixels of a frame (default: %(default)s)")
    parser.add_argument("--no-media", action="store_true", help="draw nothing; show what the evaluation drew")
    options = parser.parse_args(arguments)
    if options.rows is not None and options.rows < 1:
        parser.error(f"--rows {options.rows}: at least one clip is needed")
    if options.width < 16:
        parser.error(f"--width {options.width}: at least 16 pixels are needed")
    try:
        page = report(options)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(page)
    return 0


def report(options: argparse.Namespace) -> Path:
    """Write the page; returns its path.

    Raises:
        DataError: a folder holds no evaluation, two have one name, or the data are missing.
    """
    folders = [_named(text, len(options.runs) > 1) for text in options.runs]
    evaluations = [found for prefix, folder in folders for found in _evaluations(folder, prefix)]
    names = [e.name for e in evaluations]
    if len(set(names)) < len(names):
        raise DataError(f"two evaluations are named {max(names, key=names.count)!r}. Remedy: give names, NAME=RUN.")
    page = options.out or folders[0][1] / "report.html"
    compared = None if options.compare is None else [_pair(evaluations, pair) for pair in options.compare]
    trained = [(prefix + path.parent.name, path.parent) for prefix, folder in folders for path in _curves(folder)]
    summary = {**run_summary(evaluations), "git": evaluations[0].fact("git", "")}
    media = None if options.no_media else _media(_roots(options.data), evaluations)
    write_report(page, options.title, summary, evaluations, trained, media, evaluations, compared, options.rows,
                 options.width, [folder for _, folder in folders])
    return page


def _named(text: str, several: bool) -> tuple[str, Path]:
    """(prefix of its evaluations, folder) of one argument."""
    name, _, folder = text.rpartition("=")
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Remedy: name the folder of an evaluation or of a run.")
    prefix = name or (path.resolve().name if several else "")
    return (f"{prefix}/" if prefix else ""), path


def _evaluations(folder: Path, prefix: str) -> list[Evaluation]:
    found = find_evaluations(folder, prefix)
    if not found:
        raise DataError(
            f"{folder}: holds no evaluation (<split>/metrics.json with predictions.jsonl). "
            "Remedy: evaluate with train_ds_test.py, or name the folder of an evaluation."
        )
    return found


def _curves(folder: Path) -> list[Path]:
    return sorted([*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")], key=lambda p: p.stat().st_mtime)


def _pair(evaluations: Sequence[Evaluation], names: Sequence[str]) -> tuple[Evaluation, Evaluation]:
    known = {e.name: e for e in evaluations}
    for name in names:
        if name not in known:
            raise DataError(f"--compare {name}: no such evaluation. Remedy: name two of {', '.join(known)}.")
    return known[names[0]], known[names[1]]


def _roots(texts: Sequence[str]) -> dict[str, str]:
    """Benchmark -> root of its data, as --data names them; one without a name is that of any benchmark ("")."""
    roots = {}
    for text in texts:
        name, _, root = text.partition("=") if text.startswith(BENCHMARKS) else ("", "", text)
        roots[name] = root
    return roots


def _media(roots: Mapping[str, str], evaluations: Sequence[Evaluation]) -> dict[str, MediaSource]:
    """Benchmark -> the data that were evaluated."""
    from dataset.gallery import media_of  # imported late: --help needs no readers

    media = {}
    for benchmark in dict.fromkeys(e.benchmark for e in evaluations):
        alike = [e for e in evaluations if e.benchmark == benchmark]
        named = dict.fromkeys(e.data_root for e in alike if e.data_root)
        root = roots.get(benchmark, roots.get(""))
        if root is None and len(named) != 1:
            raise DataError(f"the evaluations name {len(named)} data sets ({', '.join(named)}). Remedy: give --data.")
        frames = {e.fact("config", {}).get("data", {}).get("num_frames") for e in alike}
        if len(frames) != 1:
            raise DataError(
                f"data.num_frames differs between the evaluations: {frames}. Remedy: report them separately."
            )
        media[benchmark] = media_of(benchmark, next(iter(named)) if root is None else root, frames.pop())
    return media


if __name__ == "__main__":
    sys.exit(main())
