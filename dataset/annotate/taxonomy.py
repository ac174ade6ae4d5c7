"""Why a path is wrong: seven types in three families (paper section 7.1, Figure 4).

On real data the types come from a backend (`templates/classify.txt`); in the mini world from rules over its truth. The
rules judge the steps in the order in which they depend on each other, and name the first that is wrong. One type has no
place there: nothing in that world is common knowledge, so no rule yields `general_knowledge`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dataset.annotate.backend import Reply, Request
from dataset.annotate.engine import Judge, Verdict
from dataset.mini_language import NULL_KIND, clause, place
from dataset.mini_scene import CLASSES, COLOURS
from dataset.refavs import Row
from utils.answers import parse_answer


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

_CLASS = "|".join(sorted(map(re.escape, CLASSES), key=len, reverse=True))
_NAMED = re.compile(rf"({'|'.join(COLOURS)}) ({_CLASS})(?![\w-])")
_HEARD = re.compile(rf"(?<![\w-])({_CLASS}|loud|quiet)(?![\w-])")


def rule_label(row: Row, text: str) -> str:
    """The type of a mini-world failure.

    Args:
        row: with its truth.
        text: the wrong path.

    Returns:
        The first that holds: classes seen are wrong (visual_misidentification), only colours are (entity_attribute),
        they stand in other places (spatial_referential), sounds or loudness are wrong (audio_perception), only their
        order is (temporal_reasoning); all steps right but the thing picked (spatial_referential or temporal_reasoning
        by the kind of question, else logical_contradiction); a step that is missing, or an answer that names another
        class than the thing picked (logical_contradiction).
    """
    truth = row.truth or {}
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    restated = [s for s in sentences if clause(row.reference) in s]
    others = [s for s in sentences if s not in restated]
    seen = next((_NAMED.findall(s) for s in others if len(_NAMED.findall(s)) == 3), None)
    heard = next((_HEARD.findall(s) for s in others if re.search(r"\baudio\b", s)), None)
    found = _perception(seen, heard, truth)
    if found:
        return found
    if seen is None or heard is None or not restated:
        return "logical_contradiction"
    return _decision(row, restated[0], text)


def _perception(seen: list[tuple[str, str]] | None, heard: list[str] | None, truth: dict) -> str | None:
    """The first wrong step of what is seen and heard, None if both are right (or absent)."""
    things = [tuple(thing) for thing in truth["things"]]
    if seen is not None and seen != things:
        if sorted(seen) == sorted(things):
            return "spatial_referential"
        same = [name for _, name in seen] == [name for _, name in things]
        return "entity_attribute" if same else "visual_misidentification"
    expected = [w for name, level in truth["sounds"] for w in ((name,) if level == "alone" else (name, level))]
    if heard is not None and heard != expected:
        return "temporal_reasoning" if _pairs(heard) == _pairs(expected) else "audio_perception"
    return None


def _pairs(words: Sequence[str]) -> list[tuple[str, ...]]:
    """(class, loudness) regardless of order."""
    return sorted(tuple(words[i : i + 2]) for i in range(0, len(words), 2))


def _decision(row: Row, sentence: str, text: str) -> str:
    """All that is perceived is right: was the wrong thing picked, or another one answered?"""
    things, target = row.truth["things"], row.truth["target"]
    picked = sentence.rsplit("it is ", 1)[-1]
    right = target is not None and " ".join(things[target]) in picked and place(target) in picked
    named = _NAMED.search(picked)
    if right or (named and named[2] != parse_answer(text)) or row.kind == NULL_KIND:
        return "logical_contradiction"
    if row.kind == "temporal":
        return "temporal_reasoning"
    return "spatial_referential" if row.kind in ("spatial", "audio_spatial") else "logical_contradiction"


def classifier_judge() -> Judge:
    """Judge of replies to templates/classify.txt: the name of one type."""

    def judge(_: Request, reply: Reply) -> Verdict:
        named = [name for name in NAMES if re.search(rf"\b{name}\b", reply.text)]
        if len(named) != 1:
            return Verdict("refused", problems=("not_one_type",))
        return Verdict("accepted", {"type": named[0]})

    return judge


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
