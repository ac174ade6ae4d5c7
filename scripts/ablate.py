"""The paper's ablations: train, evaluate and tabulate every row of a table.

    python scripts/ablate.py --table 4 --seeds 3                        # on the mini world
    python scripts/ablate.py --table all --seeds 3 --jobs 2 --docs docs/ablations_mini.md
    python scripts/ablate.py --table 2 --scale paper --dry-run          # the runs with estimated GPU-hours
    python scripts/ablate.py --table 2 --scale paper --print-commands   # for a cluster; --report makes the table then

Rows and runs are declared in configs/ablations.yaml. A run's folder is named by a hash of its resolved configuration,
of the runs it builds upon and its seed: what rows share is made once, a changed value makes exactly the runs that
depend on it anew, a finished run is not made again unless the code has changed, an interrupted one continues.
Results: <out>/table_<N>.{md,json,csv,html}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.schema import RunConfig  # noqa: E402 - the project's root must be on the path first
from utils.config import check_paths, load_config  # noqa: E402
from utils.errors import AuroraError, ConfigError, run_command  # noqa: E402
from utils.files import hash_files, lock, write_json, write_text  # noqa: E402
from utils.report.ablations import Table, document, outcome, write_table  # noqa: E402
from utils.tables import format_table  # noqa: E402

DECLARED = "configs/ablations.yaml"
NO_MATTER: dict[str, Any] = {"output_dir": True, "log": True, "engine": {"threads"}, "data": {"num_workers"},
                             "eval": {"output_dir"}}  # fmt: skip
"""Fields that no result depends on: they are no part of a run's hash."""
CODE = ("dataset/**/*.py", "model/**/*.py", "assets/mini_base/*", "train_ds*.py", "utils/types.py", "utils/answers.py",
        "utils/engine.py", "utils/evaluation.py", "utils/metrics.py", "utils/scoring.py")  # fmt: skip
"""What a result depends on besides."""
IN_SEVERAL_PROCESSES = ("train_ds.py", "train_ds_test.py", "scripts/mine_failures.py")
PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Run:
    """One run of one public command with one seed."""

    kind: str
    """Its name in ablations.yaml; `eval_cot` for the evaluation `eval` of `cot`."""
    seed: int
    """0 where none matters."""
    name: str
    """Kind, seed and key."""
    key: str
    """Hash of the resolved configuration, the keys of the runs it needs and the seed."""
    command: tuple[str, ...]
    folder: Path
    output: Path
    """Exists once the command is done."""
    needs: tuple[str, ...]
    """Names of runs."""
    config: RunConfig | None

    @property
    def stamp(self) -> Path:
        """Holds the hash of the code it was begun with and, once it is done, its seconds."""
        return self.folder.parent / "steps" / f"{self.name}.json"


class Plan:
    """The runs behind some rows, ancestors first, each once.

    Args:
        declared: the content of ablations.yaml.
        scale: mini or paper.
        out: folder of the runs.
        processes: of a training or an evaluation.
    """

    def __init__(self, declared: Mapping[str, Any], scale: str, out: Path, processes: int) -> None:
        self.declared, self.scale, self.out, self.processes = declared, declared["scale"][scale], out, processes
        self.runs: dict[str, Run] = {}
        """Run name -> run, in an order in which they can be made."""
        self._added: dict[tuple[str, int, str | None], Run] = {}

    def row(self, table: Table, method: str, seed: int) -> Run:
        """The evaluation that stands for a row, with all that it needs."""
        run, _, checkpoint = table.rows[method].partition("/")
        return self.add(table.evaluate, seed, f"{{{run}}}/{checkpoint or 'final'}")

    def add(self, kind: str, seed: int, checkpoint: str | None = None) -> Run:
        """A run with a seed, and all that it needs; `checkpoint` is what an evaluation reads.

        Raises:
            ConfigError: a configuration is wrong.
            AuroraError: ablations.yaml has no such run.
        """
        if (kind, seed, checkpoint) not in self._added:
            command = self.scale.get("commands", {}).get(kind)
            made = self._configured(kind, seed, checkpoint) if command is None else self._command(kind, seed, command)
            same = next((run for run in self.runs.values() if run.key == made.key), made)  # another's configuration
            self.runs.setdefault(same.name, same)
            self._added[kind, seed, checkpoint] = same
        return self._added[kind, seed, checkpoint]

    def fields(self, kind: str) -> tuple[str, dict[str, str]]:
        """The YAML file that a run builds upon, and its overrides, field -> value."""
        items = [*self.declared["runs"].get(kind, ()), *self.scale["runs"].get(kind, ())]
        if not items and not kind.endswith(".yaml"):
            raise AuroraError(f"{DECLARED}: no run {kind!r} at this scale. Remedy: declare it under runs.")
        file, fields = kind, {}
        for item in items:
            field, is_field, value = item.partition("=")
            if is_field:
                fields[field] = value
            else:
                file, fields = self.fields(item)
        return file, fields

    def _configured(self, kind: str, seed: int, checkpoint: str | None) -> Run:
        file, fields = self.fields(kind)
        fields = ({} if checkpoint is None else {"eval.checkpoint": checkpoint}) | fields
        parents = {name: self.add(name, seed) for value in fields.values() for name in PLACE.findall(value)}
        path = f"{self.scale['configs']}/{file}"
        # The key holds the names of the runs it needs, not their paths: results may be moved to another --out.
        names = {name: run.folder.name for name, run in parents.items()}
        config = load_config(path, [f"seed={seed}", *_filled(fields, names)])
        resolved = config.model_dump(mode="json", exclude=NO_MATTER)
        key = _hash([resolved, sorted(run.key for run in parents.values())])
        kind = kind if checkpoint is None else f"{kind}_{PLACE.findall(checkpoint)[0]}"
        folder = self.out / f"{kind}-s{seed}-{key}"
        own = [f"output_dir={folder}", f"seed={seed}", *_filled(fields, {n: r.folder for n, r in parents.items()})]
        if checkpoint is None:
            script, output = "train_ds.py", folder / "final/config.yaml"
            own += self._batch(config)
        else:
            script, output = "train_ds_test.py", folder / config.eval.splits[-1] / "metrics.json"
            own.append(f"eval.output_dir={folder}")
        needs = tuple(run.name for run in parents.values())
        return Run(kind, seed, folder.name, key, (script, "--config", path, *own), folder, output, needs, config)

    def _command(self, kind: str, seed: int, text: str) -> Run:
        parents = {name: self.add(name, seed) for name in PLACE.findall(text) if name != "folder"}
        words = text.split()
        seed = max((run.seed for run in parents.values()), default=0)  # it counts where what is read depends on it
        settings = [words, *(run.key for run in parents.values())]
        if "--config" in words:
            overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
            config = load_config(words[words.index("--config") + 1], overrides)
            settings.append(config.model_dump(mode="json", exclude=NO_MATTER))
        key = _hash(settings)
        shared = "{folder}" not in text  # data that is made once for all
        folder = Path(words[words.index("--out") + 1]) if shared else self.out / f"{kind}-s{seed}-{key}"
        paths = {"folder": folder, **{name: run.folder for name, run in parents.items()}}
        command = tuple(_put(word, paths) for word in words)
        output = Path(command[words.index("--out") + 1])
        needs = tuple(run.name for run in parents.values())
        return Run(kind, seed, kind if shared else folder.name, key, command, folder, output, needs, None)

    def _batch(self, config: RunConfig) -> list[str]:
        """Keeps a step's clips where another number of processes is asked for than the configurations are made for."""
        section, _, field = self.scale["divide"].partition(".")
        whole = getattr(getattr(config, section), field) * self.scale["processes"]
        if self.processes == self.scale["processes"]:
            return []
        if whole % self.processes:
            usual = f"{section}.{field} times the usual {self.scale['processes']}"
            raise AuroraError(f"--num_gpus {self.processes} must divide {whole}, {usual}. Remedy: choose a divisor.")
        return [f"{section}.{field}={whole // self.processes}"]

    def ancestors(self, name: str) -> dict[str, None]:
        """Names of the runs that a run needs, itself last, in an order in which they can be made."""
        above = (other for parent in self.runs[name].needs for other in self.ancestors(parent))
        return dict.fromkeys([*above, name])

    def launched(self, run: Run) -> tuple[str, ...]:
        """Its command line. torchrun, because `deepspeed` does not pass SIGTERM on to the processes it starts."""
        if self.processes == 1 or run.command[0] not in IN_SEVERAL_PROCESSES:
            return ("python", *run.command)
        several = ("--standalone", "--nproc-per-node", str(self.processes))
        return ("python", "-m", "torch.distributed.run", *several, *run.command)


class Maker:
    """Makes the runs of a plan; a run is done when its output is there, unless it was begun with other code.

    Each run is made under a lock of its own, so that several of these may share a folder; the command holds the lock
    too, so that none starts while one that outlived its parent writes.

    Args:
        plan: the runs.
        any_code: whether finished runs count though the code has changed since.
    """

    def __init__(self, plan: Plan, any_code: bool) -> None:
        self.plan, self.any_code = plan, any_code
        self.code = hash_files({path for pattern in CODE for path in Path().glob(pattern) if path.is_file()})
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def seconds(self) -> dict[str, float | None]:
        """Name -> seconds of the runs that are done, None where they are not known (it ran on a cluster)."""
        done = {name: run for name, run in self.plan.runs.items() if run.output.exists() and not self._outdated(run)}
        return {name: self._stamp(run).get("seconds") for name, run in done.items()}

    def everything(self, jobs: int) -> None:
        """Makes what is not done, `jobs` runs at a time, in the given order where nothing speaks against it.

        Raises:
            ConfigError: a file that no run makes is missing.
            AuroraError: a command failed; what runs beside it is ended, to be continued by the next call.
        """
        done = self.seconds()
        waiting = {name: run for name, run in self.plan.runs.items() if name not in done}
        print(f"{len(self.plan.runs)} runs, {len(done)} finished", flush=True)
        self._check_paths(waiting)
        running: dict[Future[None], str] = {}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    unfinished = {*waiting, *running.values()}
                    free = [run for run in waiting.values() if unfinished.isdisjoint(run.needs)]
                    for run in free[: jobs - len(running)]:
                        del waiting[run.name]
                        running[pool.submit(self.make, run)] = run.name
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()
            except BaseException:  # a failure beside them, Ctrl-C, SIGTERM
                self.stopping = True
                for child in list(self.children):
                    child.terminate()
                raise

    def make(self, run: Run) -> None:
        """Runs a command, in its folder as it was left unless the code has changed since.

        Raises:
            AuroraError: the command failed or left no output.
        """
        with lock(self.plan.out / "locks" / run.name) as held:
            # Nothing old is mixed into the new; data that is made once for all judges that by itself.
            if self._outdated(run) and run.folder.parent == self.plan.out:
                shutil.rmtree(run.folder, ignore_errors=True)
            write_json(run.stamp, {"code": self.code})
            command = self.plan.launched(run)
            print(f"== {run.name}: {shlex.join(command)}", flush=True)
            start = time.monotonic()
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
            child = subprocess.Popen(command, env={**os.environ, "PATH": path}, pass_fds=(held.fileno(),))
            self.children.add(child)
            if self.stopping:  # while the command was being started
                child.terminate()
            status = child.wait()
            self.children.discard(child)
            if status != 0 or not run.output.exists():
                reason = f"ended with status {status}" if status else f"left no {run.output}"
                raise AuroraError(f"run {run.name} {reason}: {shlex.join(command)}. Remedy: see its message above.")
            write_json(run.stamp, {"code": self.code, "seconds": time.monotonic() - start})

    def _stamp(self, run: Run) -> dict[str, Any]:
        return json.loads(run.stamp.read_text(encoding="utf-8")) if run.stamp.is_file() else {}

    def _outdated(self, run: Run) -> bool:
        """Whether it was begun with other code."""
        return not self.any_code and self._stamp(run).get("code", self.code) != self.code

    def _check_paths(self, runs: Mapping[str, Run]) -> None:
        """Requires files that are nobody's output, before hours are spent."""
        problems = {}
        made = tuple(str(run.folder) for run in self.plan.runs.values())
        for run in runs.values():
            if run.config is not None:
                try:
                    check_paths(load_config(run.command[2], run.command[3:]))
                except ConfigError as error:
                    problems |= {(p.field, p.value): p for p in error.problems if not str(p.value).startswith(made)}
        if problems:
            raise ConfigError(list(problems.values()), "paths")


def cost_table(plan: Plan, seconds: Mapping[str, float | None], scale: str) -> str:
    """The plan as text: each run, what it needs, its GPU-hours (on the mini world CPU process-hours), their sum.

    Hours are what a finished run took, or the mean of finished ones like it, or arithmetic (`paper_seconds`).
    """
    lines, known = [], []
    for name, run in plan.runs.items():
        processes = plan.processes if run.command[0] in IN_SEVERAL_PROCESSES else 1
        like = [taken for other, taken in seconds.items() if taken is not None and _alike(plan.runs[other], run)]
        guess = paper_seconds(plan, run) if scale == "paper" else None
        source = "arithmetic" if guess is not None else "unknown until one like it has run"
        if name in seconds:
            guess, source = None if seconds[name] is None else seconds[name] * processes, "finished"
        elif like:
            guess, source = sum(like) / len(like) * processes, f"mean of {len(like)} like it"
        known += [] if guess is None or name in seconds else [guess / 3600]
        lines.append([name, ", ".join(run.needs) or None, None if guess is None else guess / 3600, source])
    unknown = len(lines) - len(seconds) - len(known)
    table = format_table(["run", "needs", "GPU-hours", "from"], lines)
    left = f"open: {sum(known):.2f} GPU-hours and {unknown} unknown"
    return f"{table}\n{len(lines)} runs, {len(seconds)} finished; {left}"


def paper_seconds(plan: Plan, run: Run) -> float | None:
    """GPU-seconds of the 7B model on A40s by arithmetic; None where it does not apply (a text encoder, a command).

    A training clip costs 6 P S operations (forward, recomputed forward, backward of the activations; P = 7.6e9 weights,
    S spliced positions), an answer being written reads all weights once a token. An A40 has 149.7 TFLOP/s (bf16, dense)
    and 696 GB/s on its data sheet, of which 40 % and 60 % are assumed to be reached. It is no measurement, and leaves
    out loading, the towers and SAM.
    """
    parameters, operations, bandwidth = 7.6e9, 0.4 * 149.7e12, 0.6 * 696e9
    positions = 845 + 1496 + 300  # video and audio tokens of a clip as shipped (docs/benchmarks.md), and about its text
    # Rows of Ref-AVS's metadata.csv; AVSBench S4's test clips (Zhou et al. 2022, table 2).
    rows = {"test_s": 2288, "test_u": 1656, "test_n": 1028, "test": 740}
    config, evaluated = run.config, run.command[0] == "train_ds_test.py"
    model = plan.runs[run.needs[0]].config if evaluated else config
    if config is None or model is None or model.model.prompter == "text_encoder":
        return None
    written = 6 if model.stage == "sft" and model.data.answer == "plain" else 200  # "It is [SEG].", or a reasoning
    write = written * 2 * parameters / bandwidth
    if evaluated:
        each = 2 * parameters * positions / operations + write
        return each * sum(rows.get(split, 0) for split in config.eval.splits)
    grpo = config.stage == "grpo"
    positions += (config.grpo.group_size - 1) * written if grpo else 0  # a group's answers share one prompt
    clips = config.optim.steps * config.engine.micro_batch * config.engine.accumulation * plan.scale["processes"]
    return clips * (6 * parameters * positions / operations + (write if grpo else 0))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit status. `root` is the project in which the commands run."""
    os.chdir(root)
    declared = yaml.safe_load(Path(DECLARED).read_text(encoding="utf-8"))
    tables = {str(name): Table(str(name), **fields) for name, fields in declared["tables"].items()}
    options = _options(arguments, tables, declared)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running commands are ended too
    return run_command(lambda: ablate(options, tables, declared))


def ablate(options: argparse.Namespace, tables: Mapping[str, Table], declared: Mapping[str, Any]) -> None:
    """Plan the runs of the tables that were asked for, and make or print them."""
    chosen = [t for t in tables.values() if options.table == t.name or (options.table == "all" and t.is_paper)]
    plan = Plan(declared, options.scale, options.out, options.num_gpus)
    rows = {(t.name, method, seed): plan.row(t, method, seed)
            for t in chosen for seed in range(options.seeds) for method in t.rows}  # fmt: skip
    maker = Maker(plan, options.any_code)
    done = maker.seconds()
    if options.dry_run:
        print(cost_table(plan, done, options.scale))
        return
    if options.print_commands:
        for name, run in plan.runs.items():
            if name not in done:
                waits = [other for other in run.needs if other not in done]
                print(f"# {name}" + (f" after {', '.join(waits)}" if waits else ""))
                print(shlex.join(plan.launched(run)))
        return
    if not options.report:
        maker.everything(options.jobs)
    write_tables(chosen, rows, maker, options)


def write_tables(
    tables: list[Table], rows: Mapping[tuple[str, str, int], Run], maker: Maker, options: argparse.Namespace
) -> None:
    """Tables of what has finished, and on request the document of all of them."""
    seconds, outcomes = maker.seconds(), []
    known = {name: value or 0.0 for name, value in seconds.items()}
    for table in tables:
        own = {(method, seed): run for (name, method, seed), run in rows.items() if name == table.name}
        behind = {name for run in own.values() for name in maker.plan.ancestors(run.name)}
        finished = {key: run.folder for key, run in own.items() if run.name in seconds}
        found = outcome(table, finished, range(options.seeds), sum(known.get(name, 0.0) for name in behind))
        print(write_table(found, options.out / f"table_{table.name}"), flush=True)
        outcomes.append(found)
    if options.docs is not None:
        before = options.docs.read_text(encoding="utf-8") if options.docs.is_file() else ""
        write_text(options.docs, document(outcomes, sum(known.values()), before))


def _options(arguments: list[str] | None, tables: Mapping[str, Table], declared: Mapping) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--table", required=True, choices=[*tables, "all"], help="of the paper, or a study of ours")
    add("--scale", choices=("mini", "paper"), default="mini", help="default: %(default)s")
    add("--seeds", type=int, default=1, help="this many, from 0 (default: %(default)s)")
    add("--num_gpus", type=int, help="processes of a run, also on a CPU (default: 1 mini, 2 paper)")
    add("--jobs", type=int, default=1, help="runs at a time, beside each other on the CPU (default: %(default)s)")
    add("--out", type=Path, help="default: runs/ablations/<scale>")
    add("--any-code", action="store_true", help="finished runs count though the code has changed since")
    add("--docs", type=Path, help="also write all tables asked for into this Markdown file")
    what.add_argument("--dry-run", action="store_true", help="print the runs with estimated GPU-hours")
    what.add_argument("--print-commands", action="store_true", help="print the command of each run, for a cluster")
    what.add_argument("--report", action="store_true", help="write the tables from what has finished")
    options = parser.parse_args(arguments)
    if options.num_gpus is None:
        options.num_gpus = declared["scale"][options.scale]["processes"]
    options.out = options.out or Path("runs/ablations") / options.scale
    if min(options.seeds, options.num_gpus, options.jobs) < 1:
        parser.error("--seeds, --num_gpus and --jobs must be at least 1")
    if options.jobs > 1 and options.scale == "paper":
        parser.error("--jobs shares CPU cores, not GPUs. Use --print-commands and start each run as a job of its own")
    if options.scale == "paper" and options.table != "all" and not tables[options.table].is_paper:
        parser.error(f"--table {options.table} is of the mini world: leave out --scale paper")
    return options


def _filled(fields: Mapping[str, str], folders: Mapping[str, object]) -> list[str]:
    """Overrides as the command line takes them, with folders for the names in braces."""
    return [f"{field}={_put(value, folders)}" for field, value in fields.items()]


def _put(text: str, folders: Mapping[str, object]) -> str:
    return PLACE.sub(lambda match: str(folders[match[1]]), text)


def _alike(a: Run, b: Run) -> bool:
    """Whether two runs take about as long: one kind, or trainings of one stage, length and prompter."""
    if a.kind == b.kind or a.config is None or b.config is None or {a.command[0], b.command[0]} != {"train_ds.py"}:
        return a.kind == b.kind
    one, other = ((c.stage, c.optim.steps, c.model.prompter) for c in (a.config, b.config))
    return one == other


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


if __name__ == "__main__":
    sys.exit(main())
