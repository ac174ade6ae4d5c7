"""The paper's ablations: train, evaluate and tabulate every row of a table.

    python scripts/ablate.py --table 4 --seeds 3                    # on the mini world
    python scripts/ablate.py --table all --seeds 3 --jobs 2 --docs docs/ablations_mini.md
    python scripts/ablate.py --table 2 --scale paper --dry-run      # the graph of runs with estimated GPU-hours
    python scripts/ablate.py --table 2 --scale paper --print-commands   # each run as a job of its own
    python scripts/ablate.py --table 4 --only cot-s0-1a2b3c4d5e     # one run; what it needs must have finished
    python scripts/ablate.py --table 4 --report                     # tables of what has finished, no run
    python scripts/ablate.py --table grpo --seeds 3                 # our study of stage 3 (docs/grpo.md)

Runs shared by rows and tables are made once. A finished run is not made again, an interrupted one continues; a changed
configuration makes exactly the runs that depend on it anew. Results: <out>/table_<N>.{md,html,csv,json}.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.ablation.cost import cost_table, estimates  # noqa: E402 - the project's root must be on the path first
from scripts.ablation.graph import GPUS, Graph, Setting, ancestors  # noqa: E402
from scripts.ablation.render import csv_text, document, html, markdown  # noqa: E402
from scripts.ablation.results import Outcome, outcome, to_json  # noqa: E402
from scripts.ablation.runner import Runner  # noqa: E402
from scripts.ablation.tables import STUDIES, TABLES, Table  # noqa: E402
from utils.errors import AuroraError, plain  # noqa: E402
from utils.results import write_bytes, write_json  # noqa: E402

EVERY = TABLES | STUDIES


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status. `root` is the project in which the commands run."""
    options = _options(arguments)
    os.chdir(root)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running command is ended too
    tables = [table for name, table in EVERY.items() if options.table in (str(name), "all" if name in TABLES else "")]
    try:
        setting = Setting(root, options.out, options.configs, options.scale, options.num_gpus)
        graph = Graph(setting)
        for table in tables:
            for seed in range(options.seeds):
                for row in table.rows:
                    graph.add(row.evaluation, seed)
        runner = Runner(graph, options.any_code)
        if options.dry_run:
            seconds = runner.finished()
            print(cost_table(graph.nodes, estimates(graph.nodes, seconds, options.scale, options.num_gpus)))
            return 0
        if options.print_commands:
            runner.print_commands(shlex.join(_own_arguments(options)))
            return 0
        if options.only:
            runner.only(options.only)
        elif not options.report:
            runner.everything(options.jobs)
        write_tables(graph, runner, tables, range(options.seeds), options.docs)
    except (AuroraError, ValueError) as error:
        print(f"error: {plain(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def write_tables(
    graph: Graph, runner: Runner, tables: Sequence[Table], seeds: Sequence[int], docs: Path | None
) -> list[Outcome]:
    """Tables of what has finished, in all forms, and on request the document of all of them."""
    seconds = runner.finished()
    outcomes = []
    for table in tables:
        nodes = {(row.evaluation, seed): graph.add(row.evaluation, seed) for row in table.rows for seed in seeds}
        folders = {k: runner.setting.root / n.step.folder for k, n in nodes.items() if n.step.name in seconds}
        behind = {name for node in nodes.values() for name in ancestors(graph, node.step.name)}
        found = outcome(table, folders, tuple(seeds), sum(seconds.get(name, 0.0) for name in behind))
        path = runner.folder / f"table_{table.number}"
        for suffix, text in ((".md", markdown(found)), (".html", html(found)), (".csv", csv_text(found))):
            write_bytes(path.with_suffix(suffix), text.encode())
        write_json(path.with_suffix(".json"), to_json(found))
        print(markdown(found), flush=True)
        outcomes.append(found)
    if docs is not None:
        before = docs.read_text(encoding="utf-8") if docs.is_file() else ""
        write_bytes(docs, document(outcomes, sum(seconds.values()), before).encode())
    return outcomes


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", required=True, choices=[*map(str, EVERY), "all"], help="of the paper, or a study of ours")
    add("--scale", choices=("mini", "paper"), default="mini", help="default: %(default)s")
    add("--seeds", type=int, default=1, help="this many, from 0 (default: %(default)s)")
    add("--num_gpus", type=int, help="processes of a run, also on a CPU (default: 1 mini, 2 paper)")
    add("--jobs", type=int, default=1, help="runs at a time, each on its share of the CPU cores (default: %(default)s)")
    add("--out", type=Path, help="default: runs/ablations/<scale>")
    add("--configs", type=Path, help="folder of the rows' YAML files (default: configs/ablations/<scale>)")
    add("--any-code", action="store_true", help="finished runs count though the code has changed since")
    add("--docs", type=Path, help="also write all tables asked for into this Markdown file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the graph with estimated GPU-hours")
    what.add_argument("--print-commands", action="store_true", help="print a command for each run, for a cluster")
    what.add_argument("--only", metavar="RUN", help="one run of the graph")
    what.add_argument("--report", action="store_true", help="write the tables from what has finished")
    options = parser.parse_args(arguments)
    options.num_gpus = GPUS[options.scale] if options.num_gpus is None else options.num_gpus
    options.out = options.out or Path("runs/ablations") / options.scale
    options.configs = options.configs or Path("configs/ablations") / options.scale
    if min(options.seeds, options.num_gpus, options.jobs) < 1:
        parser.error("--seeds, --num_gpus and --jobs must be at least 1")
    if options.jobs > 1 and options.scale == "paper":
        parser.error("--jobs shares CPU cores, not GPUs. Use --print-commands and start each run as a job of its own")
    if options.table in STUDIES and options.scale == "paper":
        parser.error(f"--table {options.table} is of the mini world: leave out --scale paper")
    return options


def _own_arguments(options: argparse.Namespace) -> list[str]:
    """The arguments that name the same graph again."""
    named = {"table": options.table, "scale": options.scale, "seeds": options.seeds, "num_gpus": options.num_gpus,
             "out": options.out, "configs": options.configs}  # fmt: skip
    flags = ["--any-code"] if options.any_code else []
    return [*(part for name, value in named.items() for part in (f"--{name}", str(value))), *flags]


if __name__ == "__main__":
    sys.exit(main())
