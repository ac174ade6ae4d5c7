"""Will it fit? Memory per GPU of every stage, before anything is loaded.

    python scripts/plan_memory.py --config configs/grpo.yaml --gpus 2 --gpu-gb 48 [section.field=value ...]

The model is built on the meta device and a step of the stage is run there at its real shapes (no weight, no GPU).
Prints what the configured run keeps and where it peaks, by component; then weights, gradients, optimiser states,
activations, logits, KV cache and totals of every stage beside the config at ZeRO 0 to 3, with gradient checkpointing
and without; where something does not fit, the cheapest change with which it does. Exit status 1 if the configured run
does not fit. GB are 1e9 bytes. What is assumed and what is not counted: docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.stages.planner import Planner, PlanOptions, changes  # noqa: E402 - the project's root must be on the path first
from utils.errors import AuroraError  # noqa: E402
from utils.memory_plan import Plan, cheapest  # noqa: E402
from utils.memory_tables import grid_text, markdown, plan_json, plan_text, remedy_text  # noqa: E402

STAGES = ("teacher", "sft", "reflective", "grpo", "eval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a stage")
    parser.add_argument("--gpus", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--gpu-gb", type=float, default=48.0, help="memory of one, 1e9 bytes (default: %(default)s)")
    parser.add_argument("--reserve-gb", type=float, default=2.0, help="kept for what is not counted (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, help="longest answer (default: by the stage)")
    parser.add_argument("--prompt-tokens", type=int, help="text of the prompt (default: 200)")
    parser.add_argument("--frame-size", type=_size, help="native frames as HEIGHTxWIDTH (default: 720x1280)")
    parser.add_argument("--alone", action="store_true", help="this stage, not the others beside its file")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/memory.md instead")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: at least one is needed")
    try:
        return run(options)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def run(options: argparse.Namespace) -> int:
    """Plan, print, and say what would help; returns the exit status."""
    gpus = PlanOptions(options.gpus, options.gpu_gb, options.reserve_gb, options.answer_tokens, options.prompt_tokens,
                       options.frame_size)  # fmt: skip
    planner = Planner(options.config, options.overrides, gpus)
    config, plan = planner.config(), planner.plan()
    result = {"config": str(options.config), "overrides": options.overrides, "gpus": options.gpus,
              "gpu_gb": options.gpu_gb, "plan": plan_json(plan)}  # fmt: skip
    if not options.markdown:
        result |= describe(planner, plan)
    planners = {config.stage: planner}
    for stage, path in {} if options.alone else beside(options.config, config.stage):
        planners[stage] = Planner(path, (), gpus)
    planners = {stage: planners[stage] for stage in STAGES if stage in planners}
    grid = {stage: each.grid() for stage, each in planners.items()}
    if options.markdown:
        own = {s: (str(p.path), 0 if s == "eval" else p.config().engine.zero_stage) for s, p in planners.items()}
        print(markdown(grid, own))
    else:
        print(grid_text(grid))
        if options.overrides and len(grid) > 1:
            print(f"(the overrides stand for {config.stage} alone; the other stages are those of their files)")
    result["stages"] = {
        stage: {zero: row.plan and plan_json(row.plan) for zero, row in rows.items()} for stage, rows in grid.items()
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if plan.fits else 1


def describe(planner: Planner, plan: Plan) -> dict[str, object]:
    """Print the configured run and, where it does not fit, its remedy; returns the remedy for the JSON."""
    from model.aurora.meta import sizes_of_base

    options, config = planner.options, planner.config()
    print(f"{planner.path}: stage {config.stage} on {options.gpus} x {options.gpu_gb:g} GB, "
          f"sizes of {sizes_of_base(config)[1]}\n")  # fmt: skip
    print(plan_text(plan, planner.footprint()))
    if plan.fits:
        return {}
    remedy = cheapest(changes(config, options.gpus), planner.plan)
    print(remedy_text(remedy, plan))
    return {"remedy": [asdict(change) for change in remedy.changes]}


def beside(config: Path, stage: str) -> Iterator[tuple[str, Path]]:
    """The files of the other stages in the config's folder."""
    for name in STAGES:
        path = config.parent / f"{name}.yaml"
        if name != stage and path.is_file():
            yield name, path


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
