"""Plans of memory for a configuration and its changes (scripts/plan_memory.py; the message of an exhausted GPU)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.rules import VOCABULARY
from configs.schema import RunConfig
from utils.config import load_config
from utils.errors import ConfigError
from utils.memory_plan import GB, Change, Footprint, Plan, cheapest, make_plan
from utils.memory_tables import Row

ENGINE_ALONE = ("engine.zero_stage", "engine.offload", "engine.accumulation", "log.")
"""Fields that change nothing about a forward and backward, so that a measurement holds for all their values."""


@dataclass
class PlanOptions:
    """The GPUs, and what a plan assumes of the data (None: by the stage, see `model.stages.workload`)."""

    gpus: int
    gpu_gb: float
    """Memory of one, 1e9 bytes."""
    reserve_gb: float = 2.0
    """Kept for what is not counted."""
    answer_tokens: int | None = None
    prompt_tokens: int | None = None
    frame_size: tuple[int, int] | None = None
    """(height, width)."""


class Planner:
    """Plans of one config file under overrides; a measurement is made once for each run that differs in its shapes."""

    def __init__(self, config: Path, overrides: Sequence[str], options: PlanOptions) -> None:
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


def explain(config: Path, overrides: Sequence[str]) -> str:
    """What fills the memory of a run that ran out of it, and the cheapest change; for the GPU of this process."""
    import torch

    size = torch.cuda.get_device_properties(0).total_memory / GB if torch.cuda.is_available() else 48.0
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    options = PlanOptions(gpus, size)
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
