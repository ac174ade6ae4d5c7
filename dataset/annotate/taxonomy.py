"""Why a path is wrong: seven types in three families (paper section 7.1, Figure 4).

On real data the types come from a backend (`templates/classify.txt`), in the mini world from rules over its truth
(`dataset.annotate.mini.rule_label`).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from dataset.annotate.backends import Request
from dataset.annotate.gates import GateResult, refused
from dataset.records import numbered_lines


@dataclass(frozen=True)
class FailureType:
    """One bar of Figure 4."""

    name: str
    title: str
    family: str
    paper: int
    """Samples in the paper's Figure 4."""


TYPES = (
    FailureType("general_knowledge", "Over-reliance on General Knowledge", "Knowledge Misapplication", 428),
    FailureType("visual_misidentification", "Visual Object Misidentification", "Knowledge Misapplication", 285),
    FailureType("audio_perception", "Audio Perception Failure", "Perceptual Failure", 251),
    FailureType("entity_attribute", "Entity Attribute Error", "Perceptual Failure", 103),
    FailureType("temporal_reasoning", "Temporal Reasoning Error", "Reasoning and Integration Failure", 166),
    FailureType("logical_contradiction", "Logical/Reasoning Contradiction", "Reasoning and Integration Failure", 148),
    FailureType("spatial_referential", "Spatial & Referential Error", "Reasoning and Integration Failure", 124),
)
NAMES = tuple(t.name for t in TYPES)


def type_gate(_: Request, reply: str) -> GateResult:
    """Gate of replies to templates/classify.txt: the name of one type."""
    named = [name for name in NAMES if re.search(rf"\b{name}\b", reply)]
    return GateResult("accepted", {"type": named[0]}) if len(named) == 1 else refused("not_one_type")


def count_table(labels: Iterable[tuple[str, str, str]]) -> list[dict[str, object]]:
    """One line per type, with counts in all, by question kind and by class, beside the paper's.

    Args:
        labels: (type, kind, true class) of each failure.
    """
    labels = list(labels)
    kinds = sorted({kind for _, kind, _ in labels if kind})
    classes = sorted({name for _, _, name in labels})
    total, paper = len(labels), sum(t.paper for t in TYPES)
    table = []
    for kind_of in TYPES:
        own = [(kind, name) for label, kind, name in labels if label == kind_of.name]
        by_kind, by_class = Counter(k for k, _ in own), Counter(c for _, c in own)
        table.append({
            "type": kind_of.name, "family": kind_of.family, "count": len(own),
            "percent": round(100 * len(own) / total, 2) if total else 0.0,
            "paper_count": kind_of.paper, "paper_percent": round(100 * kind_of.paper / paper, 2),
            **{f"kind:{kind}": by_kind[kind] for kind in kinds},
            **{f"class:{name}": by_class[name] for name in classes},
        })  # fmt: skip
    return table


def write_table(path: Path, known: Mapping[int, tuple[str, str]]) -> str:
    """Count labelled rows into <path>.csv and draw them as <path>.png; returns a line that says so.

    Args:
        path: JSONL with a row and its type on each line.
        known: row -> (question kind, true class).
    """
    labelled = [json.loads(text) for _, text in numbered_lines(path)]
    table = count_table((line["type"], *known[line["row"]]) for line in labelled)
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for offset, share, count, label in (
        (-0.2, "percent", "count", f"this run ({len(labelled)})"),
        (0.2, "paper_percent", "paper_count", f"paper, Figure 4 ({sum(t.paper for t in TYPES)})"),
    ):
        bars = axes.bar([i + offset for i in range(len(table))], [line[share] for line in table], 0.4, label=label)
        axes.bar_label(bars, [str(line[count]) for line in table], fontsize=8)
    axes.set_xticks(range(len(table)), [t.title.replace(" ", "\n") for t in TYPES], fontsize=7)
    axes.set_ylabel("% of failures")
    axes.legend()
    figure.savefig(f"{path}.png", dpi=120)
    return f"{len(labelled)} labelled: {path}.csv, {path}.png"
