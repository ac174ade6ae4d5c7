"""Peak memory and speed of every stage on this machine's GPUs, beside the plan's prediction.

    python scripts/bench_gpu.py [--gpus 2] [--stages teacher sft grpo eval] [--attention sdpa eager]
                                [--sam-sizes 224 1024] [--steps 4]

A model of the 7B sizes with random weights in bf16 and SAM ViT-H runs the shipped configs at their real lengths: no
weights are needed. Each case runs in a process of its own. Writes runs/bench/gpu.json and the table between the marks
of docs/benchmarks.md, with the machine's name. Without a GPU it says so and writes nothing (exit status 1).
`--tiny` runs the mini configs on the CPU, to see that the code works; it prints, and writes nothing either.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the project's root must be on the path first

from configs.schema import RunConfig  # noqa: E402
from model.aurora.trained import save_trained  # noqa: E402
from scripts.dev.random_run import infer, random_batch, random_model, train  # noqa: E402
from scripts.plan_memory import GB, Machine, Workload, make_plan  # noqa: E402
from utils import distributed  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.files import write_json, write_text  # noqa: E402

STAGES = ("teacher", "sft", "reflective", "grpo", "eval")
DOCUMENT, RESULT = ROOT / "docs/benchmarks.md", ROOT / "runs/bench/gpu.json"
MARKS = ("<!-- measured: written by scripts/bench_gpu.py -->", "<!-- end of measured -->")
TINY = ("engine.micro_batch=1", "model.decode_frames_per_step=null", "data.feature_cache=none", "engine.threads=1",
        "grpo.max_new_tokens=4", "eval.max_new_tokens=4", "eval.batch_size=1")  # fmt: skip
TOLERANCE = 0.15
"""Share by which the plan may miss the measurement."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    stage: str
    attention: str
    sam_image_size: int
    gpus: int
    steps: int
    tiny: bool = False

    def config(self, folder: Path) -> RunConfig:
        """The shipped configuration of the stage, with what the case changes; `folder` gets the teacher."""
        path = ROOT / "configs" / ("mini" if self.tiny else "") / f"{self.stage}.yaml"
        overrides = [f"model.attention={self.attention}", f"output_dir={folder}", "log.samples_every=0"]
        overrides += TINY if self.tiny else [f"model.sam_image_size={self.sam_image_size}"]
        if self.stage == "sft":
            overrides.append(f"sft.teacher_checkpoint={folder / 'teacher'}")
        return load_config(path, overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["teacher", "sft", "grpo", "eval"])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--sam-sizes", nargs="+", type=int, default=[224, 1024], help="pixels (default: 224 1024)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps, the first not timed (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="mini configs on the CPU; nothing is written")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in this process
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA GPU on this machine: nothing is measured and nothing written. The plan of every stage stands in "
              "docs/memory.md; run this command where the GPUs are (--tiny tries the code on a CPU).",
              file=sys.stderr)  # fmt: skip
        return 1
    rows = [launch(case) for case in cases(options)]
    print(table(rows))
    if not options.tiny:
        write(rows, machine())
        print(f"written: {RESULT.relative_to(ROOT)}, {DOCUMENT.relative_to(ROOT)}")
    return 1 if any("error" in row for row in rows) else 0


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every stage with the first attention and SAM size; the others on one stage, where they matter."""
    if options.tiny:
        yield from (Case(stage, "sdpa", 96, 1, 2, tiny=True) for stage in options.stages)
        return
    for stage in options.stages:
        yield Case(stage, options.attention[0], options.sam_sizes[0], options.gpus, options.steps)
    variants = [(a, options.sam_sizes[0]) for a in options.attention[1:]]
    variants += [(options.attention[0], size) for size in options.sam_sizes[1:]]
    for attention, size in variants:
        for stage in [s for s in ("sft", "eval") if s in options.stages] or options.stages[:1]:
            yield Case(stage, attention, size, options.gpus, options.steps)


def launch(case: Case) -> dict[str, Any]:
    """Run a case in fresh processes; an error (out of memory, too) becomes the row's `error`."""
    command = [sys.executable]
    if case.gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.gpus}"]
    print(f"== {case}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return {**asdict(case), "error": last[-1] if last else f"ended with status {done.returncode}"}
    return json.loads(lines[0])


def run_case(case: Case) -> dict[str, Any]:
    """Measure one case in this process (all processes call it; the main one's row counts)."""
    with tempfile.TemporaryDirectory() as folder:
        config = case.config(Path(folder))
        device = distributed.start(config.engine.threads)
        model = random_model(config, device)
        if case.stage == "sft":
            save_trained(model, Path(config.sft.teacher_checkpoint))
        batch = random_batch(model, Workload.of_stage(config))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clips, seconds = (infer if case.stage == "eval" else train)(model, batch, config, case.steps)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        world = distributed.world_size()
        distributed.stop()
    plan = make_plan(config, Machine(world, 0, reserve=0))
    return {**asdict(case), "seconds": seconds, "clips_per_second": clips * world / seconds, "peak_bytes": peak,
            "planned_bytes": plan.total, "planned_peaks": plan.peaks}  # fmt: skip


def machine() -> dict[str, str]:
    """What a measurement belongs to."""
    card = torch.cuda.get_device_properties(0)
    return {
        "host": platform.node(), "gpu": f"{torch.cuda.device_count()} x {card.name}",
        "gpu_memory_bytes": str(card.total_memory), "torch": torch.__version__, "cuda": str(torch.version.cuda),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was measured beside what was planned."""
    header = "| stage | attention | SAM | GPUs | clips/s | peak GB | planned GB | off by |"
    lines = [header, "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        first = f"| {row['stage']} | {row['attention']} | {row['sam_image_size']} | {row['gpus']} |"
        if "error" in row:
            lines.append(f"{first} {row['error']} | | | |")
            continue
        peak, planned = row["peak_bytes"], row["planned_bytes"]
        share = None if peak is None else planned / peak - 1
        off = "-" if share is None else f"{100 * share:+.0f} %{'' if abs(share) <= TOLERANCE else ' (over 15 %)'}"
        measured = "-" if peak is None else f"{peak / GB:.2f}"
        lines.append(f"{first} {row['clips_per_second']:.3f} | {measured} | {planned / GB:.2f} | {off} |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], facts: dict[str, str]) -> None:
    """The JSON, and the table between the marks of the document."""
    write_json(RESULT, {"machine": facts, "rows": list(rows)})
    named = ", ".join(f"{name} {value}" for name, value in facts.items())
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    write_text(DOCUMENT, f"{before}{MARKS[0]}\n\nMeasured on {named}.\n\n{table(rows)}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    sys.exit(main())
