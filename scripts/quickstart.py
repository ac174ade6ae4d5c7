"""The whole pipeline on the mini world: data, teacher, SFT, mining and correction, reflective SFT, GRPO, evaluation.

    python scripts/quickstart.py [--num_gpus 2] [--seed 0] [--out runs/quickstart] [--full]

Every step is one of the public commands and is printed before it runs. A step that is done already is skipped and an
interrupted one continues, so the quickstart may be started again at any time. Without a GPU, evaluations run beside
each other and beside training in one process, one per core; the output of each is shown when it ends, and is in
<out>/steps/ meanwhile. Mining and the last evaluation, which nothing could run beside, have a process per core.
Results: <out>/summary.json (percent, protocol official; the other protocol under "per_expression"), <out>/index.html.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.gallery import media_of  # noqa: E402 - the project's root must be on the path first
from utils.config import git_state, load_config  # noqa: E402 - the project's root must be on the path first
from utils.errors import AuroraError  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.pipeline import Pipeline, Step, locked  # noqa: E402
from utils.report.page import write_report  # noqa: E402
from utils.report.runs import find_evaluations, probe_summaries, stage_summary, summary_table  # noqa: E402
from utils.schedule import Cores, elapsed, run_all  # noqa: E402

DATA = "data/mini"
WORLD_CODE = ("dataset/mini/*.py", "scripts/make_mini_world.py")
CODE = ("dataset/*.py", "model/**/*.py", "assets/mini_base/*", "utils/types.py", "utils/answers.py")
TRAIN_CODE = (*CODE, "train_ds.py", "utils/engine.py", "utils/seed.py")
EVAL_CODE = (*CODE, "train_ds_test.py", "utils/evaluation.py", "utils/metrics*.py", "utils/scoring.py")


@dataclass(frozen=True)
class Run:
    """A script; `{out}` in its arguments is the folder of this quickstart."""

    name: str
    arguments: tuple[str, ...]
    folder: str
    output: str
    sources: tuple[str, ...]
    after: tuple[str, ...] = ()
    stamps: str | None = None
    parallel: bool = False
    alone: bool = False
    full: bool = False

    def step(self, options: argparse.Namespace) -> Step:
        """One call of the script; what is both parallel and alone has a process per core where there is no GPU."""
        command, folder, output = (_fill(text, options) for text in (self.arguments, self.folder, self.output))
        stamps = None if self.stamps is None else Path(self.stamps)
        return Step(
            self.name, command, Path(folder), Path(output), self.sources, self.after,
            parallel=self.parallel and options.jobs == 1, alone=self.alone, stamps=stamps,
            processes=_per_core(self.parallel and self.alone, options),
        )  # fmt: skip


@dataclass(frozen=True)
class Train:
    """A training stage; `after` names the steps whose results it reads."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ("world",)
    full: bool = False

    def step(self, options: argparse.Namespace) -> Step:
        """One call of train_ds.py; the processes share the batch of the config."""
        folder, config = options.out / self.name, f"configs/mini/{self.config}.yaml"
        settings = [f"output_dir={folder}", f"seed={options.seed}", *_fill(self.overrides, options)]
        batch = load_config(config, settings).engine.micro_batch
        if batch % options.num_gpus:
            raise AuroraError(f"--num_gpus {options.num_gpus} must divide engine.micro_batch, {batch} in {config}")
        settings.append(f"engine.micro_batch={batch // options.num_gpus}")
        return Step(
            self.name,
            command=("train_ds.py", "--config", config, *settings),
            settings=load_config(config, settings).model_dump_json(),
            folder=folder,
            output=folder / "final/config.yaml",
            sources=TRAIN_CODE,
            needs=self.after,
            parallel=True,
            alone=options.num_gpus > 1,
            leading=options.num_gpus == 1,
        )


@dataclass(frozen=True)
class Evaluate:
    """An evaluation of a trained stage, with or without a probe."""

    stage: str
    splits: tuple[str, ...]
    probe: str = "none"
    pictures: int = 0
    overrides: tuple[str, ...] = ()
    alone: bool = False
    full: bool = False

    @property
    def name(self) -> str:
        return f"eval_{self.stage}" if self.probe == "none" else f"eval_{self.stage}_{self.probe}"

    def step(self, options: argparse.Namespace) -> Step:
        """One call of train_ds_test.py."""
        folder, config = options.out / self.name, "configs/mini/eval.yaml"
        settings = (
            f"output_dir={folder}",
            f"seed={options.seed}",
            f"eval.output_dir={folder}",
            f"eval.checkpoint={options.out / self.stage / 'final'}",
            f"eval.splits=[{', '.join(self.splits)}]",
            f"eval.probe={self.probe}",
            f"eval.pictures={self.pictures}",
            *self.overrides,
        )
        return Step(
            self.name,
            command=("train_ds_test.py", "--config", config, *settings),
            settings=load_config(config, settings).model_dump_json(),
            folder=folder,
            output=folder / self.splits[-1] / "metrics.json",
            sources=EVAL_CODE,
            needs=(self.stage,),
            parallel=options.jobs == 1,
            processes=_per_core(self.alone, options),
            alone=self.alone,
        )


def _per_core(alone: bool, options: argparse.Namespace) -> int | None:
    """Processes of a step that others wait for, and that has all cores, if it does not run on GPUs."""
    return options.jobs if alone and options.jobs > 1 else None


ENGINE_CODE = ("dataset/*.py", "dataset/annotate/**/*", "scripts/mine_failures.py", "scripts/correct_paths.py",
               "scripts/build_reflective.py", "scripts/analyze_failures.py", "utils/answers.py")  # fmt: skip
TEACHER = "sft.teacher_checkpoint={out}/teacher/final"
STEPS: tuple[Run | Train | Evaluate, ...] = (
    Run("world", ("scripts/make_mini_world.py", "--out", DATA), DATA, f"{DATA}/metadata.csv", WORLD_CODE,
        stamps="data/steps", alone=True),
    Train("teacher", "teacher"),
    Train("sft", "sft", (TEACHER,), ("world", "teacher")),
    Run("mine", ("scripts/mine_failures.py", "--config", "configs/mini/eval.yaml", "--checkpoint", "{out}/sft/final",
                 "--out", "{out}/mine/failures.jsonl", "eval.limit=1500"),
        "{out}/mine", "{out}/mine/failures.jsonl", (*EVAL_CODE, *ENGINE_CODE, "configs/mini/eval.yaml"), ("sft",),
        parallel=True, alone=True),
    Run("correct", ("scripts/correct_paths.py", "--data", DATA, "--failures", "{out}/mine/failures.jsonl",
                    "--out", "{out}/correct/corrections.jsonl", "--backend", "mini"),
        "{out}/correct", "{out}/correct/corrections.jsonl", ENGINE_CODE, ("mine",)),
    Run("compose", ("scripts/build_reflective.py", "--corrections", "{out}/correct/corrections.jsonl",
                    "--out", "{out}/compose/reflective.jsonl"),
        "{out}/compose", "{out}/compose/reflective.jsonl", ENGINE_CODE, ("correct",)),
    Evaluate("sft", ("test_s", "test_u", "test_n"), pictures=12),
    Evaluate("teacher", ("test_s", "test_u"), overrides=(f"data.cot=[{DATA}/cot/held_out.jsonl]",)),
    Evaluate("sft", ("test_s",), probe="shuffle_audio"),
    Evaluate("sft", ("test_s",), probe="shuffle_video"),
    Run("taxonomy", ("scripts/analyze_failures.py", "--data", DATA, "--failures", "{out}/mine/failures.jsonl",
                     "--out", "{out}/taxonomy/types.jsonl"),
        "{out}/taxonomy", "{out}/taxonomy/types.jsonl", ENGINE_CODE, ("mine",)),
    Train("reflective", "reflective",
          ("init_from={out}/sft/final", "reflective.paths=[{out}/compose/reflective.jsonl]"), ("world", "compose")),
    Train("grpo", "grpo", ("init_from={out}/reflective/final",), ("world", "reflective")),
    Evaluate("reflective", ("test_s", "test_u", "test_n")),
    Evaluate("grpo", ("test_s", "test_u", "test_n"), pictures=12, alone=True),
    Train("sft_plain", "sft", (TEACHER, "data.answer=plain"), ("world", "teacher"), full=True),
    Train("sft_without_null", "sft", (TEACHER, "data.null_rows=false"), ("world", "teacher"), full=True),
    Evaluate("sft_plain", ("test_s", "test_u"), full=True),
    Evaluate("sft_without_null", ("test_s", "test_n"), full=True),
)
"""What is run, in order of what others wait for; those marked full only with --full."""
MOST_JOBS = 4
"""Commands at a time, each with one to two GB of memory."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=1, help="processes, on a CPU too (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="also SFT without reasoning, SFT without null rows")
    options = parser.parse_args(arguments)
    if options.num_gpus < 1:
        parser.error(f"--num_gpus {options.num_gpus}: at least one process is needed")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running command is ended too
    options.jobs = jobs()
    chosen = [step for step in STEPS if options.full or not step.full]
    began = time.monotonic()
    try:
        with locked(options.out / ".lock") as lock:
            finished = Pipeline(ROOT, options.out, options.num_gpus, lock)

            def pipeline(cores: Cores) -> Pipeline:
                """Training shows its progress; of what runs beside others, whole outputs follow each other."""
                quiet = cores is not None
                return Pipeline(ROOT, options.out, options.num_gpus, lock, cores=cores, quiet=quiet).sharing(finished)

            run_all([step.step(options) for step in chosen], options.jobs, pipeline)
            summary = summarise(chosen, options, finished)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(summary_table(summary))
    print(f"{time.monotonic() - began:.0f} s: {options.out / 'summary.json'}, {options.out / 'index.html'}")
    return 0


def jobs() -> int:
    """Commands at a time: as many as there are cores, since one more core hardly speeds up a small model.

    With GPUs it is one, on all of them.
    """
    if torch.cuda.is_available() or not hasattr(os, "sched_getaffinity"):
        return 1
    return min(MOST_JOBS, len(os.sched_getaffinity(0)))


def summarise(steps: Sequence[object], options: argparse.Namespace, finished: Pipeline) -> dict[str, Any]:
    """Write summary.json and index.html from what the steps left. `total` counts time shared by several steps once."""
    evaluations = [step for step in steps if isinstance(step, Evaluate)]
    times = {**finished.seconds, "total": elapsed(finished.spans.values())}
    summary = {
        "stages": {e.stage: stage_summary(options.out / e.name) for e in evaluations if e.probe == "none"},
        "probes": probe_summaries(
            [(e.probe, e.stage, e.name, options.out / e.name) for e in evaluations if e.probe != "none"]
        ),
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "config": {"folder": "configs/mini", "seed": options.seed, "num_gpus": options.num_gpus, "full": options.full},
        "git": git_state(),
    }
    write_json(options.out / "summary.json", summary)
    trained = [(step.name, options.out / step.name) for step in steps if isinstance(step, Train)]
    pictured = [options.out / e.name for e in evaluations if e.pictures]
    found = find_evaluations(options.out)
    write_report(
        options.out / "index.html", "AURORA on the mini world", found,
        summary=summary, runs=trained, media={"refavs": media_of("refavs", DATA)},
        shown=[e for e in found if e.folder in pictured],
    )  # fmt: skip
    return summary


def _fill(text: Any, options: argparse.Namespace) -> Any:
    """`{out}` replaced in a text, or in each of several."""
    return text.format(out=options.out) if isinstance(text, str) else tuple(_fill(part, options) for part in text)


if __name__ == "__main__":
    sys.exit(main())
