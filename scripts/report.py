"""One HTML page about evaluations: results beside the paper's, breakdowns with intervals, comparisons, every clip.

    python scripts/report.py runs/quickstart
    python scripts/report.py before=runs/sft/eval after=runs/grpo/eval --out runs/report.html --data data/refavs
    python scripts/report.py reflective=runs/grpo no_stage_2=runs/grpo_sft --png curves

A run is a folder of train_ds_test.py (<split>/metrics.json) or one that holds such folders, up to two levels below;
training curves (metrics.jsonl) and failure types (<x>.jsonl.csv of scripts/analyze_failures.py) in it are shown too.
Prints all scores, writes the page and, beside it, the folder <page>_files with pictures and sounds, which a browser
loads when they are looked at. Move or publish both together.

With --png nothing but the training curves of stage 3 is drawn, of runs that need no evaluation: figure_8.png (overall,
class, IoU and format reward), figure_9.png (reasoning length, intra-group std) as the paper's figures, and, where they
were logged, figure_policy.png (entropy, share of groups without variance, clip fraction, KL, gradient norm, tokens per
second, share of right reasoning). The faint line is what was logged, the strong one its running mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders; a name is put before its evaluations")
    parser.add_argument("--out", type=Path, help="page (default: report.html in the first run)")
    parser.add_argument("--data", action="append", default=[], metavar="[BENCHMARK=]ROOT",
                        help="root of the data (default: what the evaluations name)")
    parser.add_argument("--title", default="AURORA: evaluation report", help="heading (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, action="append", metavar=("BEFORE", "AFTER"),
                        help="two evaluations by name, may be repeated (default: each with the one before it)")
    parser.add_argument("--rows", type=int, help="at most this many clips, evenly spread (default: all)")
    parser.add_argument("--width", type=int, default=256, help="pixels of a frame (default: %(default)s)")
    parser.add_argument("--no-media", action="store_true", help="draw nothing; show what the evaluation drew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores of all stages and probes there too")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the curves of stage 3 there, and no page")
    parser.add_argument("--window", type=int, default=10, help="rows in a running mean of --png (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least, unit in (("rows", 1, "clip is"), ("width", 16, "pixels are"), ("window", 1, "row is")):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: at least {least} {unit} needed")
    return options


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    OPTIONS = parse()  # before the imports below, which take seconds: --help and a slip of the pen are answered at once

from dataset.gallery import media_of  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.report.curves import write_figures  # noqa: E402
from utils.report.media import MediaSource  # noqa: E402
from utils.report.page import write_report  # noqa: E402
from utils.report.runs import Evaluation, find_evaluations, run_summary, summary_table  # noqa: E402

BENCHMARKS = ("refavs=", "avsbench_s4=", "avsbench_ms3=")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Writes what was asked for."""
    folders = []
    for text in options.runs:
        name, _, folder = text.rpartition("=")
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder. Remedy: name the folder of an evaluation or of a run.")
        folders.append((name, Path(folder)))
    if options.png:
        runs = [(name or folder.resolve().name, folder / "metrics.jsonl") for name, folder in folders]
        print(*write_figures(runs, options.png, options.window), sep="\n")
    else:
        print(_report(folders, options))


def _report(folders: Sequence[tuple[str, Path]], options: argparse.Namespace) -> Path:
    """Write the page; returns its path."""
    evaluations: list[Evaluation] = []
    curves = []
    for name, folder in folders:
        name = name or (folder.resolve().name if len(folders) > 1 else "")
        prefix = f"{name}/" if name else ""
        found = find_evaluations(folder, prefix)
        if not found:
            raise DataError(
                f"{folder}: holds no evaluation (<split>/metrics.json with predictions.jsonl). "
                "Remedy: evaluate with train_ds_test.py, or name the folder of an evaluation."
            )
        evaluations += found
        logs = sorted([*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")], key=lambda p: p.stat().st_mtime)
        curves += [(prefix + path.parent.name, path.parent) for path in logs]
    names = [e.name for e in evaluations]
    if len(set(names)) < len(names):
        raise DataError(f"two evaluations are named {max(names, key=names.count)!r}. Remedy: give names, NAME=RUN.")
    known = dict(zip(names, evaluations, strict=True))
    for name in (name for pair in options.compare or () for name in pair):
        if name not in known:
            raise DataError(f"--compare {name}: no such evaluation. Remedy: name two of {', '.join(known)}.")
    page = options.out or folders[0][1] / "report.html"
    summary = {**run_summary(evaluations), "git": evaluations[0].fact("git", "")}
    print(summary_table(summary))
    if options.json:
        write_json(options.json, summary)
    write_report(
        page, options.title, evaluations,
        summary=summary, runs=curves, media={} if options.no_media else _media(options.data, evaluations),
        compared=options.compare and [(known[before], known[after]) for before, after in options.compare],
        limit=options.rows, width=options.width, taxonomies=[folder for _, folder in folders],
    )  # fmt: skip
    return page


def _media(named_roots: Sequence[str], evaluations: Sequence[Evaluation]) -> Mapping[str, MediaSource]:
    """Benchmark -> the data that were evaluated; --data without a benchmark's name is the root of any."""
    roots = {}
    for text in named_roots:
        benchmark, _, root = text.partition("=") if text.startswith(BENCHMARKS) else ("", "", text)
        roots[benchmark] = root
    media = {}
    for benchmark in dict.fromkeys(e.benchmark for e in evaluations):
        alike = [e for e in evaluations if e.benchmark == benchmark]
        named = dict.fromkeys(e.data("root") for e in alike if e.data("root"))
        root = roots.get(benchmark, roots.get(""))
        if root is None and len(named) != 1:
            raise DataError(f"the evaluations name {len(named)} data sets ({', '.join(named)}). Remedy: give --data.")
        frames = {e.data("num_frames") for e in alike}
        if len(frames) != 1:
            raise DataError(
                f"data.num_frames differs between the evaluations: {frames}. Remedy: report them separately."
            )
        media[benchmark] = media_of(benchmark, next(iter(named)) if root is None else root, frames.pop())
    return media


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(OPTIONS)))
