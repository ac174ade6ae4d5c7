"""How long a node will take: what it or its like took before, or arithmetic for the 7B model on A40s.

The arithmetic: a training clip costs 6 P S operations (forward, recomputed forward, backward of the activations; P =
7.6e9 weights, S spliced positions), an answer being written reads all weights once a token. An A40 has 149.7 TFLOP/s
(bf16, dense) and 696 GB/s on its data sheet; MATMUL and MEMORY of these are assumed to be reached. It is no
measurement, and leaves out loading, the towers and SAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scripts.ablation.graph import GPUS, Node
from utils.tables import format_table

PARAMETERS = 7.6e9
POSITIONS = 845 + 1496 + 300
"""Video and audio tokens of a clip as shipped (docs/benchmarks.md), and about its text."""
MATMUL, MEMORY = 0.4 * 149.7e12, 0.6 * 696e9
ROWS = {"test_s": 2288, "test_u": 1656, "test_n": 1028, "test": 740}
"""Rows of the test splits: Ref-AVS's metadata.csv; AVSBench S4's test clips (Zhou et al. 2022, table 2)."""
WRITTEN, SHORT = 200, 6
"""Tokens of an answer with reasoning, about, and of "It is [SEG]."."""


@dataclass(frozen=True)
class Estimate:
    """GPU-hours (on the mini world CPU process-hours) and where they come from; None = nothing is known."""

    hours: float | None
    source: str


def estimates(nodes: Mapping[str, Node], seconds: Mapping[str, float], scale: str, gpus: int) -> dict[str, Estimate]:
    """Step name -> estimate.

    Args:
        nodes: of the graph.
        seconds: of the finished steps.
        scale: mini or paper.
        gpus: processes of a parallel step.
    """
    found: dict[str, Estimate] = {}
    for name, node in nodes.items():
        processes = gpus if node.step.parallel else 1
        like = [s for other, s in seconds.items() if other in nodes and _like(nodes[other], node)]
        if name in seconds:
            found[name] = Estimate(seconds[name] * processes / 3600, "finished")
        elif like:
            found[name] = Estimate(sum(like) / len(like) * processes / 3600, f"mean of {len(like)} like it")
        elif scale == "paper" and (guess := _arithmetic(node, nodes)) is not None:
            found[name] = Estimate(guess / 3600, "arithmetic")
        else:
            found[name] = Estimate(None, "unknown until one like it has run")
    return found


def cost_table(nodes: Mapping[str, Node], estimate: Mapping[str, Estimate]) -> str:
    """The graph as text: each node, what it needs, its hours; the sum of what is known and open below."""
    lines = [[name, ", ".join(nodes[name].needs) or None, e.hours, e.source] for name, e in estimate.items()]
    known = [e.hours for e in estimate.values() if e.hours is not None and e.source != "finished"]
    unknown = sum(e.hours is None for e in estimate.values())
    done = sum(e.source == "finished" for e in estimate.values())
    table = format_table(["run", "needs", "GPU-hours", "from"], lines)
    return f"{table}\n{len(nodes)} runs, {done} finished; open: {sum(known):.2f} GPU-hours and {unknown} unknown"


def _like(a: Node, b: Node) -> bool:
    """Whether two nodes take about as long: one name, or trainings of one stage and length."""
    if a.name == b.name:
        return True
    if a.kind != b.kind or a.config is None or b.config is None:
        return False
    same = a.config.stage == b.config.stage and a.config.optim.steps == b.config.optim.steps
    return a.kind == "train" and same and a.config.model.prompter == b.config.model.prompter


def _arithmetic(node: Node, nodes: Mapping[str, Node]) -> float | None:
    """GPU-seconds of one node; None for what the arithmetic does not cover (a text encoder, a command)."""
    trained = next((nodes[n].config for n in node.needs if nodes[n].kind == "train"), None)
    model = trained if node.kind == "evaluate" else node.config
    if node.config is None or model is None or model.model.prompter == "text_encoder":
        return None
    words = SHORT if model.stage == "sft" and model.data.answer == "plain" else WRITTEN
    write = words * 2 * PARAMETERS / MEMORY
    if node.kind == "evaluate":
        prefill = 2 * PARAMETERS * POSITIONS / MATMUL
        return sum(ROWS.get(split, 0) for split in node.config.eval.splits) * (prefill + write)
    engine = node.config.engine
    clips = node.config.optim.steps * engine.micro_batch * engine.accumulation * GPUS["paper"]
    answers = node.config.grpo.group_size if node.config.stage == "grpo" else 1
    seconds = 6 * PARAMETERS * (POSITIONS + (answers - 1) * WRITTEN) / MATMUL
    return clips * (seconds + (write if node.config.stage == "grpo" else 0))
