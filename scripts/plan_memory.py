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
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.rules import VOCABULARY  # noqa: E402 - the project's root must be on the path first
from configs.schema import RunConfig  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.errors import AuroraError, ConfigError  # noqa: E402
from utils.memory_plan import GB, Change, Footprint, Plan, cheapest, make_plan  # noqa: E402
from utils.memory_tables import Row, grid_text, markdown, plan_json, plan_text, remedy_text  # noqa: E402

STAGES = ("teacher", "sft", "reflective", "grpo", "eval")
ENGINE_ALONE = ("engine.zero_stage", "engine.offload", "engine.accumulation", "log.")
"""Fields that change nothing about a forward and backward, so that a measurement holds for all their values."""


class Planner:
    """Plans of one config file under overrides; a measurement is made once for each run that differs in its shapes."""

    def __init__(self, config: Path, overrides: Sequence[str], options: argparse.Namespace) -> None:
        self.path, self.overrides, self.options = config, tuple(overrides), options
        self._footprints: dict[tuple[str, ...], Footprint] = {}

    def config(self, extra: Sequence[str] = ()) -> RunConfig:
        """Raises ConfigError where the overrides contradict each other."""
        return load_config(self.path, [*self.overrides, *extra])

    def footprint(self, extra: Sequence[str] = ()) -> Footprint:
        from model.stages.footprint import measure
        from model.stages.workload import Workload

        key = tuple(text for text in extra if not text.startswith(ENGINE_ALONE))
        if key not in self._footprints:
            config = self.config(key)
            work = Workload.of_stage(
                config,
                answer_tokens=self.options.answer_tokens,
                prompt_tokens=self.options.prompt_tokens,
                frame_size=self.options.frame_size,
            )
            self._footprints[key] = measure(config, work=work)
        return self._footprints[key]

    def plan(self, extra: Sequence[str] = ()) -> Plan | None:
        """None where the configuration refuses such a run."""
        try:
            config = self.config(extra)
        except ConfigError:
            return None
        o, e = self.options, config.engine
        zero = 0 if config.stage == "eval" else e.zero_stage
        limit, reserve = round(o.gpu_gb * GB), round(o.reserve_gb * GB)
        return make_plan(self.footprint(extra), o.gpus, zero, e.accumulation, e.offload, limit, reserve)

    def grid(self) -> dict[int, Row]:
        """Plans at every ZeRO stage (evaluation has none). ZeRO-3 is planned without samples, which it cannot write."""
        stages = (0,) if self.config().stage == "eval" else range(4)
        return {zero: self.row(zero) for zero in stages}

    def row(self, zero: int) -> Row:
        """One line of the grid; a remedy is looked for among the changes of the engine, which cost no measurement."""
        extra = (f"engine.zero_stage={zero}",) + ("log.samples_every=0",) * (zero == 3)
        plan = self.plan(extra)
        if plan is None or plan.fits:
            return Row(plan)
        listed = changes(self.config(extra), self.options.gpus)
        remedy = cheapest(
            [change for change in listed if change.overrides[0].startswith("engine.")],
            lambda overrides: self.plan((*extra, *overrides)),
        )
        texts = [text for change in remedy.changes for text in change.overrides]
        return Row(plan, " ".join(texts) or f"more than the engine: --config {self.path} {' '.join(extra)}")


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
    planner = Planner(options.config, options.overrides, options)
    config, plan = planner.config(), planner.plan()
    result = {"config": str(options.config), "overrides": options.overrides, "gpus": options.gpus,
              "gpu_gb": options.gpu_gb, "plan": plan_json(plan)}  # fmt: skip
    if not options.markdown:
        result |= describe(planner, plan)
    planners = {config.stage: planner}
    for stage, path in {} if options.alone else beside(options.config, config.stage):
        planners[stage] = Planner(path, (), options)
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
    print(f"{options.config}: stage {config.stage} on {options.gpus} x {options.gpu_gb:g} GB, "
          f"sizes of {sizes_of_base(config)[1]}\n")  # fmt: skip
    print(plan_text(plan, planner.footprint()))
    if plan.fits:
        return {}
    remedy = cheapest(changes(config, options.gpus), planner.plan)
    print(remedy_text(remedy, plan))
    return {"remedy": [asdict(change) for change in remedy.changes]}


def explain(config: Path, overrides: Sequence[str]) -> str:
    """What fills the memory of a run that ran out of it, and the cheapest change; for the GPU of this process."""
    import torch

    size = torch.cuda.get_device_properties(0).total_memory / GB if torch.cuda.is_available() else 48.0
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    options = argparse.Namespace(gpus=gpus, gpu_gb=size, reserve_gb=2.0, answer_tokens=None, prompt_tokens=None,
                                 frame_size=None)  # fmt: skip
    planner = Planner(config, overrides, options)
    plan = planner.plan()
    phase = next((p for p in plan.phases if p.name == plan.peak), None)
    parts = {"weights": plan.state.weights, "gradients": plan.state.gradients, "optimiser": plan.state.optimiser,
             "teacher": plan.teacher, "buffers of communication": plan.state.communication}  # fmt: skip
    if phase is not None:
        parts |= {"activations": phase.activations, "logits": phase.logits, "KV cache": phase.kv_cache}
    most = max(parts, key=parts.__getitem__)
    # A run may need more than its plan (longer answers, larger frames): then the change must save a tenth.
    options.gpu_gb = min(size, 0.9 * plan.total / GB) if plan.fits else size
    remedy = cheapest(changes(planner.config(), gpus), planner.plan)
    change = " ".join(text for each in remedy.changes for text in each.overrides) or "more or larger GPUs"
    return (f"Planned: {plan.total / GB:.1f} of {size:.1f} GB at '{plan.peak}', most of it {most} "
            f"({parts[most] / GB:.1f} GB). Remedy: {change} (scripts/plan_memory.py --config {config}).")  # fmt: skip


def beside(config: Path, stage: str) -> Iterator[tuple[str, Path]]:
    """The files of the other stages in the config's folder."""
    for name in STAGES:
        path = config.parent / f"{name}.yaml"
        if name != stage and path.is_file():
            yield name, path


def changes(config: RunConfig, gpus: int) -> Iterator[Change]:
    """What would need less memory, from what costs nothing to what costs most; only what is not so already."""
    e, m, d, g = config.engine, config.model, config.data, config.grpo
    trains = config.stage != "eval"
    for zero in (2, 1, 0):  # a lower stage needs less where little is trained: its buffers are smaller
        if trains and zero != e.zero_stage and not (e.offload and zero == 0):
            yield Change((f"engine.zero_stage={zero}",), "nothing but communication")
    if trains and not e.gradient_checkpointing:
        yield Change(("engine.gradient_checkpointing=true",), "a third more compute in the language model")
    if e.micro_batch > 1 and trains:
        halved = (f"engine.micro_batch={e.micro_batch // 2}", f"engine.accumulation={2 * e.accumulation}")
        yield Change(halved, "smaller forwards: slower, the same batch per step")
    if not trains and config.eval.batch_size > 1:
        yield Change(("eval.batch_size=1",), "slower generation")
    if trains and config.loss.mask_side is None:
        yield Change(("loss.mask_side=512",), "mask losses at 512 pixels instead of the native size")
    if trains and (m.decode_frames_per_step or 10) > 4:
        yield Change(("model.decode_frames_per_step=4",), "mask losses on 4 drawn frames of a clip instead of all")
    rest = [pattern for pattern in config.trainable.full if not any(re.search(pattern, name) for name in VOCABULARY)]
    if trains and len(rest) < len(config.trainable.full):
        lean = ("trainable.seg_rows_only=true", f"trainable.full={json.dumps(rest)}")
        yield Change(lean, "of the vocabulary only [SEG] is learned (configs/lean)")
    if d.audio_padding_seconds is not None:
        yield Change(("data.audio_padding_seconds=null",), "496 audio tokens instead of 1,496: not as published")
    if m.sam_image_size > 224:
        yield Change(("model.sam_image_size=224",), "coarser masks, as published")
    if config.stage == "grpo" and g.group_size > 2:
        yield Change(("grpo.group_size=2",), "a group of 2: noisier advantages")
    if trains and e.zero_stage < 3 and gpus > 1:
        yield Change(("engine.zero_stage=3", "log.samples_every=0"), "weights are gathered layer by layer: slower")
    if trains and not e.offload:  # refused at ZeRO 0, allowed beside a higher stage
        yield Change(("engine.offload=true",), "optimiser on the CPU: slow steps, as published")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
