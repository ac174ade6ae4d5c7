"""A memory plan as text: what one GPU holds by component, every stage at every ZeRO stage, and the same in Markdown.

GB are 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from utils.memory_plan import GB, Footprint, Phase, Plan, Remedy
from utils.tables import format_table

GRID = ("weights", "gradients", "optimiser", "teacher", "activations, ckpt", "none", "logits", "KV cache", "buffers",
        "opt. step", "total, ckpt", "none")  # fmt: skip
"""Columns of one plan; each at its own height, so that only the totals say what is needed at once."""
NOTE = """\
GB per GPU. Each part at its own height, which is not the same moment for all; a total is the highest moment, reserve
included. ckpt = with gradient checkpointing, none = without; ! = more than the GPU has; - = refused by the config"""


@dataclass(frozen=True)
class Row:
    """A plan in the grid, and what would make it fit."""

    plan: Plan | None
    """None = the configuration refuses such a run."""
    remedy: str = ""
    """Overrides, where it does not fit."""


Grid = Mapping[str, Mapping[int, Row]]
"""Stage -> ZeRO stage -> row."""


def plan_text(plan: Plan, footprint: Footprint) -> str:
    """What stays, what each phase adds, and the verdict."""
    s, f = plan.state, footprint
    whole, trained = sum(f.weights.values()), sum(f.trained_by.values()) or 1
    rows = [
        [name.rsplit(".", 1)[-1], *(_gb(part) for part in (
            size * s.weights // whole,
            f.trained_by.get(name, 0) * s.gradients // trained,
            f.trained_by.get(name, 0) * s.optimiser // trained,
        ))]
        for name, size in f.weights.items()
    ]  # fmt: skip
    rows.append(["all", _gb(s.weights), _gb(s.gradients), _gb(s.optimiser)])
    states = "optimiser" + " (in CPU memory)" * (s.cpu > 0)
    lines = [format_table([f"stays, GB (ZeRO {plan.zero_stage})", "weights", "gradients", states], rows)]
    lines += [
        f"trained values: {sum(f.trained):,}; optimiser: float32 copy and two moments"
        + " (a share of it on each GPU)" * (plan.zero_stage > 0 and plan.gpus > 1)
        + f"\nteacher's values beside the student's: {_gb(plan.teacher)}; reserve for CUDA context, NCCL and "
        f"fragmentation (assumed): {_gb(plan.reserve)}",
        "",
    ]
    rows = [_phase_row(phase, s.communication, plan.peaks) for phase in plan.phases]
    if "optimiser step" in plan.peaks:
        rows.append(["optimiser step", *["0.00"] * 4, _gb(s.step), _gb(plan.peaks["optimiser step"])])
    header = ["comes and goes, GB", "activations", "logits", "(at most)", "KV cache", "buffers", "with what stays"]
    lines.append(format_table(header, rows))
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {_gb(plan.total - plan.limit)} GB too much"
    way, other = ("with", "without") if plan.checkpointing else ("without", "with")
    beside = "" if plan.stage == "eval" else f", {way} gradient checkpointing ({other}: {_gb(plan.other)} GB)"
    lines += ["", f"{_gb(plan.total)} GB of {_gb(plan.limit)} at the height of '{plan.peak}'{beside}: {verdict}"]
    if s.cpu:
        lines.append(f"{_gb(s.cpu)} GB of CPU memory per process for the offloaded states")
    return "\n".join(lines) + "\n"


def remedy_text(remedy: Remedy, plan: Plan) -> str:
    """The cheapest change, or that none helps."""
    if remedy.plan is None:
        return f"No change of the list makes it fit ({remedy.tried} tried): more GPUs or larger ones are needed.\n"
    lines = ["Remedy: the cheapest change with which it fits" + (" (all of them)" if len(remedy.changes) > 1 else "")]
    lines += [f"  {' '.join(change.overrides)}   # {change.cost}" for change in remedy.changes]
    lines.append(f"  {_gb(plan.total)} -> {_gb(remedy.plan.total)} GB at '{remedy.plan.peak}'")
    return "\n".join(lines) + "\n"


def grid_text(grid: Grid) -> str:
    """Every part of every stage at every ZeRO stage; below, the cheapest change of each that does not fit."""
    named = [(stage, zero, row) for stage, plans in grid.items() for zero, row in plans.items()]
    rows = [[stage if zero == min(grid[stage]) else "", str(zero), *_cells(row.plan)] for stage, zero, row in named]
    lines = [NOTE, format_table(["stage", "ZeRO", *GRID], rows)]
    lines += [f"{stage} at ZeRO {zero} fits with {row.remedy}" for stage, zero, row in named if row.remedy]
    return "\n".join(lines)


def markdown(grid: Grid, own: Mapping[str, tuple[str, int]]) -> str:
    """Two tables for a document: the files as they are configured, then all rows of the grid.

    Args:
        grid: the plans.
        own: stage -> (its config file, its own ZeRO stage).
    """
    first = [[f"`{path}`", str(zero), *_cells(grid[stage][zero].plan)] for stage, (path, zero) in own.items()]
    every = [[s, str(zero), *_cells(row.plan)] for s, plans in grid.items() for zero, row in plans.items()]
    return f"{_markdown(['config', 'ZeRO', *GRID], first)}\n\n{_markdown(['stage', 'ZeRO', *GRID], every)}"


def plan_json(plan: Plan) -> dict[str, object]:
    """The numbers of a plan, in bytes."""
    phases = [{**asdict(phase), "total": plan.peaks[phase.name]} for phase in plan.phases]
    return {
        "stage": plan.stage, "zero_stage": plan.zero_stage, "gpus": plan.gpus, "state": asdict(plan.state),
        "teacher": plan.teacher, "reserve": plan.reserve, "phases": phases, "peak": plan.peak, "total": plan.total,
        "other_phases": [asdict(phase) for phase in plan.other_phases], "total_other_checkpointing": plan.other,
        "checkpointing": plan.checkpointing, "limit": plan.limit, "fits": plan.fits,
    }  # fmt: skip


def _phase_row(phase: Phase, communication: int, peaks: dict[str, int]) -> list[str]:
    buffers = communication if phase.backward else 0
    sizes = (phase.activations, phase.logits, phase.most_logits, phase.kv_cache, buffers, peaks[phase.name])
    return [phase.name, *map(_gb, sizes)]


def _cells(plan: Plan | None) -> list[str]:
    """One plan in the columns of GRID."""
    if plan is None:
        return ["-"] * len(GRID)
    s, both = plan.state, (plan.phases, plan.other_phases or plan.phases)
    highest = [max((p.activations for p in phases), default=0) for phases in both]
    totals = [f"{_gb(total)}{'!' if total > plan.limit else ''}" for total in (plan.total, plan.other)]
    if plan.stage == "eval":  # nothing is saved for a backward, so there is nothing to checkpoint
        activations, totals = ["-", _gb(highest[0])], ["-", totals[0]]
    else:
        with_first = slice(None) if plan.checkpointing else slice(None, None, -1)
        activations, totals = [*map(_gb, highest)][with_first], totals[with_first]
    logits, cache = (max((getattr(p, name) for p in plan.phases), default=0) for name in ("most_logits", "kv_cache"))
    stays = (s.weights, s.gradients, s.optimiser, plan.teacher)
    return [*map(_gb, stays), *activations, *map(_gb, (logits, cache, s.communication, s.step)), *totals]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def _gb(size: int) -> str:
    return f"{size / GB:.2f}"
