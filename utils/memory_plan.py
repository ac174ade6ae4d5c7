"""Memory of a training step per GPU: what DeepSpeed keeps, what a step adds, and what to change when it is too much.

Arithmetic alone; `model.stages.footprint` measures the model. The buffers are those of DeepSpeed 0.19 (zero/
stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py) with torch's AdamW, read from its code: e bytes per weight (2
in bf16), P trained and A all values, W GPUs, b = REDUCE_BUCKET values:

| ZeRO | weights | gradients | float32 master, two moments (bf16) | buffers of backward | more in the optimiser step |
|---|---|---|---|---|---|
| 0 | eA | eP | 4P + 8P | - | 4P gradient, 4P of AdamW |
| 1 | eA | eP + e own | (4P + 8P) / W | eb + flattened copy | (4P + 4P) / W |
| 2 | eA | e own, twice when accumulating | (4P + 8P) / W | 2eb + flattened copy | (e P + 4P + 4P) / W |
| 3 | eA/W + live | eP/W | (4P + 8P) / W | eb + flattened copy | (4P + 4P) / W |

`own`: a rank keeps the gradients of every parameter that its partition touches, whole. In float32 ZeRO 0 has no master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size: values per buffer, allocated whole however little is trained."""
ZERO3_LIVE = 1_050_000_000
"""DeepSpeed's stage3_max_live_parameters plus its prefetch bucket: values that ZeRO-3 may hold gathered at once."""
GB = 1e9


@dataclass(frozen=True)
class Phase:
    """A part of a step, and the bytes that it adds to what stays."""

    name: str
    activations: int
    """Peak without logits and KV cache."""
    logits: int = 0
    """Logits at that peak."""
    kv_cache: int = 0
    backward: bool = False
    """Whether gradients and their buffers exist meanwhile."""
    most_logits: int = 0
    """Logits at their own height, which may be another moment than the peak."""

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.kv_cache


@dataclass(frozen=True)
class Footprint:
    """What one process of a stage holds and does, before any partition."""

    stage: str
    weights: dict[str, int]
    """Bytes by component."""
    trained: tuple[int, ...]
    """Values of each trained parameter, in the optimiser's order."""
    element: int
    """Bytes per weight."""
    phases: tuple[Phase, ...]
    """With the configuration's own choice of gradient checkpointing."""
    other_phases: tuple[Phase, ...]
    """With the other choice."""
    checkpointing: bool
    teacher: int = 0
    """Bytes of the teacher's own values (stage sft)."""
    trained_by: dict[str, int] = field(default_factory=dict)
    """Trained values by component."""

    @property
    def values(self) -> int:
        return sum(self.weights.values()) // self.element


@dataclass(frozen=True)
class State:
    """Bytes per GPU that stay through a step, and those of its two special moments."""

    weights: int
    gradients: int
    optimiser: int
    communication: int
    """Buffers during backward."""
    step: int
    """More during the optimiser's step."""
    cpu: int = 0
    """CPU memory of offloaded states."""


@dataclass(frozen=True)
class Plan:
    """The answer for one stage at one setting."""

    stage: str
    zero_stage: int
    gpus: int
    state: State
    teacher: int
    reserve: int
    phases: tuple[Phase, ...]
    other: int
    """Total with the other choice of gradient checkpointing."""
    checkpointing: bool
    limit: int
    other_phases: tuple[Phase, ...] = ()
    """With the other choice of gradient checkpointing."""

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at the height of each phase."""
        s = self.state
        stays = s.weights + s.optimiser + s.gradients + self.teacher + self.reserve
        found = {p.name: stays + p.total + (s.communication if p.backward else 0) for p in self.phases}
        if s.optimiser or s.step:
            found["optimiser step"] = stays + s.step
        return found

    @property
    def peak(self) -> str:
        """Name of the highest phase."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def total(self) -> int:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Change:
    """One way to need less memory, and what it costs."""

    overrides: tuple[str, ...]
    """As on a command line."""
    cost: str

    @property
    def fields(self) -> frozenset[str]:
        """Names of what it sets."""
        return frozenset(text.partition("=")[0] for text in self.overrides)


@dataclass(frozen=True)
class Remedy:
    """Changes that make a run fit, with the plan that they give; None = nothing did."""

    changes: tuple[Change, ...] = ()
    plan: Plan | None = None
    tried: int = field(default=0, compare=False)


def own_values(trained: Sequence[int], gpus: int) -> int:
    """Largest sum, over ranks, of the parameters that a rank's equal share of all trained values touches."""
    share, largest = sum(trained) / gpus, 0
    for rank in range(gpus):
        start, total = 0, 0
        for size in trained:
            if start < (rank + 1) * share and start + size > rank * share:
                total += size
            start += size
        largest = max(largest, total)
    return largest


def engine_state(
    trained: Sequence[int], values: int, element: int, gpus: int, zero_stage: int, accumulation: int, offload: bool
) -> State:
    """What the engine keeps on one GPU; see the module's table.

    Args:
        trained: values of each trained parameter, in order; empty for evaluation.
        values: of all parameters.
        element: bytes per weight.
        gpus: processes.
        zero_stage: 0 to 3.
        accumulation: forwards per optimiser step.
        offload: optimiser states in CPU memory.
    """
    total, largest = sum(trained), max(trained, default=0)
    if not total:
        return State(values * element, 0, 0, 0, 0)
    share = -(-total // gpus)
    master = 4 if element == 2 or zero_stage else 0
    flattened = min(total, max(REDUCE_BUCKET, largest)) * element
    if zero_stage == 0:
        copies = 8 * total if element == 2 else 4 * total
        return State(values * element, total * element, (master + 8) * total, 0, copies)
    weights, states, bucket = values * element, (master + 8) * share, REDUCE_BUCKET * element
    own = own_values(trained, gpus) * element
    if zero_stage == 1:
        gradients, buffers, step = total * element + own, bucket + flattened, 8 * share
    elif zero_stage == 2:
        gradients = own * (2 if accumulation > 1 else 1)
        buffers, step = 2 * bucket + flattened, (element + 8) * share
    else:
        weights = -(-values // gpus) * element + min(values, ZERO3_LIVE) * element
        gradients, buffers, step = share * element, bucket + min(total, REDUCE_BUCKET) * element, 8 * share
    if offload:
        return State(weights, largest * element, 0, buffers, 0, cpu=states + 4 * share + element * share)
    return State(weights, gradients, states, buffers, step)


def make_plan(
    footprint: Footprint, gpus: int, zero_stage: int, accumulation: int, offload: bool, limit: int, reserve: int
) -> Plan:
    """Lay a footprint on a machine.

    Args:
        footprint: of the stage.
        gpus, zero_stage, accumulation, offload: see `engine_state`.
        limit: bytes of one GPU.
        reserve: bytes for what is not counted (CUDA context, NCCL, fragmentation).
    """
    f = footprint
    state = engine_state(f.trained, f.values, f.element, gpus, zero_stage, accumulation, offload)
    plans = [
        Plan(f.stage, zero_stage, gpus, state, f.teacher, reserve, phases, 0, f.checkpointing, limit)
        for phases in (f.phases, f.other_phases)
    ]
    own, other = plans
    return replace(own, other=other.total, other_phases=f.other_phases)


def cheapest(changes: Iterable[Change], plan_with: Callable[[tuple[str, ...]], Plan | None]) -> Remedy:
    """The first single change that makes the plan fit; else several, none of which could be left out.

    Several are gathered in order, each in the place of an earlier one that sets the same field, as long as the total
    does not rise; then those that turn out not to be needed are dropped, the dearest first.

    Args:
        changes: the cheapest first.
        plan_with: overrides -> plan, or None where they are not allowed.
    """
    changes, tried = list(changes), 0

    def attempt(parts: Sequence[Change]) -> Plan | None:
        nonlocal tried
        tried += 1
        return plan_with(tuple(text for change in parts for text in change.overrides))

    for change in changes:
        plan = attempt([change])
        if plan is not None and plan.fits:
            return Remedy((change,), plan, tried)
    taken: list[Change] = []
    best = plan_with(())
    for change in changes:
        parts = [*(c for c in taken if not c.fields & change.fields), change]
        plan = attempt(parts)
        if plan is None or (best is not None and plan.total > best.total):
            continue
        taken, best = parts, plan
        if plan.fits:
            break
    if not taken or best is None or not best.fits:
        return Remedy(tried=tried)
    for change in reversed(taken[:-1]):
        parts = [c for c in taken if c is not change]
        plan = attempt(parts)
        if plan is not None and plan.fits:
            taken, best = parts, plan
    return Remedy(tuple(taken), best, tried)
