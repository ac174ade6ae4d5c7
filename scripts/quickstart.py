"""The whole pipeline on the mini world: data, teacher, SFT, evaluation, probes, report.

    python scripts/quickstart.py [--num_gpus 2] [--seed 0] [--out runs/quickstart] [--full]

Every step is one of the public commands and is printed before it runs. A step that is done already is skipped and an
interrupted one continues, so the quickstart may be started again at any time. Results: <out>/summary.json (percent,
protocol official; the other protocol under "per_expression") and <out>/index.html.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.config import git_state, load_config  # noqa: E402 - the project's root must be on the path first
from utils.errors import AuroraError  # noqa: E402
from utils.pipeline import Pipeline, Step, locked  # noqa: E402
from utils.results import write_json  # noqa: E402
from utils.summary import stage_summary, summary_table, write_page  # noqa: E402

DATA = Path("data/mini")
WORLD_CODE = ("dataset/mini_*.py", "scripts/make_mini_world.py")
CODE = ("configs/**/*.py", "configs/**/*.yaml", "dataset/*.py", "model/**/*.py", "assets/mini_base/*", "train_ds*.py")
CODE += tuple(f"utils/{name}.py" for name in ("checkpoint", "engine", "evaluation", "metrics*", "scoring", "types"))


@dataclass(frozen=True)
class Train:
    """A training stage; `after` names the stages whose weights it reads."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    full: bool = False


@dataclass(frozen=True)
class Evaluate:
    """An evaluation of a trained stage, with or without a probe."""

    stage: str
    splits: tuple[str, ...]
    probe: str = "none"
    pictures: int = 0
    full: bool = False

    @property
    def name(self) -> str:
        return f"eval_{self.stage}" if self.probe == "none" else f"eval_{self.stage}_{self.probe}"


TEACHER = "sft.teacher_checkpoint={out}/teacher/final"
STEPS: tuple[Train | Evaluate, ...] = (
    Train("teacher", "teacher"),
    Evaluate("teacher", ("test_s", "test_u")),
    Train("sft", "sft", (TEACHER,), ("teacher",)),
    Evaluate("sft", ("test_s", "test_u", "test_n"), pictures=12),
    Evaluate("sft", ("test_s",), probe="shuffle_audio"),
    Evaluate("sft", ("test_s",), probe="shuffle_video"),
    Train("sft_plain", "sft", (TEACHER, "data.answer=plain", "data.cot=[]"), ("teacher",), full=True),
    Evaluate("sft_plain", ("test_s", "test_u"), full=True),
)
"""What is trained and measured, in order; those marked full only with --full."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=1, help="processes, on a CPU too (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="also the SFT without reasoning (Table 2 of the paper)")
    options = parser.parse_args(arguments)
    if options.num_gpus < 1:
        parser.error(f"--num_gpus {options.num_gpus}: at least one process is needed")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running command is ended too
    chosen = [step for step in STEPS if options.full or not step.full]
    began = time.monotonic()
    try:
        with locked(options.out / ".lock") as lock:
            pipeline = Pipeline(ROOT, options.out, options.num_gpus, lock)
            pipeline.run(world_step())
            for step in chosen:
                pipeline.run(train_step(step, options) if isinstance(step, Train) else evaluate_step(step, options))
            summary = summarise(chosen, options, pipeline.seconds)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(summary_table(summary))
    print(f"{time.monotonic() - began:.0f} s: {options.out / 'summary.json'}, {options.out / 'index.html'}")
    return 0


def world_step() -> Step:
    """The mini world in the official layout."""
    command = ("scripts/make_mini_world.py", "--out", str(DATA))
    return Step("world", command, DATA, DATA / "metadata.csv", WORLD_CODE, stamps=DATA.with_name("steps"))


def train_step(step: Train, options: argparse.Namespace) -> Step:
    """One call of train_ds.py; the processes share the batch of the config."""
    folder, config = options.out / step.name, f"configs/mini/{step.config}.yaml"
    overrides = [text.format(out=options.out) for text in step.overrides]
    settings = [f"output_dir={folder}", f"seed={options.seed}", *overrides]
    batch = load_config(config, settings).engine.micro_batch
    if batch % options.num_gpus:
        raise AuroraError(f"--num_gpus {options.num_gpus} must divide engine.micro_batch, {batch} in {config}")
    settings.append(f"engine.micro_batch={batch // options.num_gpus}")
    command = ("train_ds.py", "--config", config, *settings)
    return Step(step.name, command, folder, folder / "final/config.yaml", CODE, ("world", *step.after), parallel=True)


def evaluate_step(step: Evaluate, options: argparse.Namespace) -> Step:
    """One call of train_ds_test.py."""
    folder = options.out / step.name
    settings = (
        f"output_dir={folder}",
        f"seed={options.seed}",
        f"eval.output_dir={folder}",
        f"eval.checkpoint={options.out / step.stage / 'final'}",
        f"eval.splits=[{', '.join(step.splits)}]",
        f"eval.probe={step.probe}",
        f"eval.pictures={step.pictures}",
    )
    command = ("train_ds_test.py", "--config", "configs/mini/eval.yaml", *settings)
    output = folder / step.splits[-1] / "metrics.json"
    return Step(step.name, command, folder, output, CODE, ("world", step.stage), parallel=True)


def summarise(steps: list[Train | Evaluate], options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    """Write summary.json and index.html from what the steps left."""
    evaluations = [step for step in steps if isinstance(step, Evaluate)]
    times = {**seconds, "total": sum(seconds.values())}
    summary = {
        "stages": {e.stage: stage_summary(options.out / e.name) for e in evaluations if e.probe == "none"},
        "probes": {
            e.probe: {"stage": e.stage, **stage_summary(options.out / e.name)} for e in evaluations if e.probe != "none"
        },
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "config": {"folder": "configs/mini", "seed": options.seed, "num_gpus": options.num_gpus, "full": options.full},
        "git": git_state(),
    }
    write_json(options.out / "summary.json", summary)
    trained = [(step.name, options.out / step.name) for step in steps if isinstance(step, Train)]
    pictured = [options.out / e.name for e in evaluations if e.pictures]
    write_page(options.out / "index.html", "AURORA on the mini world", summary, trained, pictured, DATA / "media")
    return summary


if __name__ == "__main__":
    sys.exit(main())
