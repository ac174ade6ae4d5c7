"""Quality gates of written reasoning (paper section 3.1: four steps; section 8.2: flexible or fixed format)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dataset.annotate.backends import Request
from dataset.annotate.prompts import Style
from dataset.records import MAX_CHARACTERS
from utils.answers import parse_answer, plain_conclusion, without_ending

SHORTEST = 60
"""Characters; a shorter text cannot hold four steps."""

STEPS = {
    "video": re.compile(r"\b(image|images|video|frames?|visual|visually|scene|see|seen|shows?)\b|\bthere is\b", re.I),
    "audio": re.compile(r"\b(audio|sounds?|hear|heard|silent|silence|loud|quiet)\b", re.I),
    "reference": re.compile(r"\b(reference|referring|refers|we look for)\b", re.I),
}
"""Words that show a step (paper section 3.1); the fourth is the ending."""

FIXED = re.compile(r"1\).*?2\).*?3\).*?4\).*?5\)", re.DOTALL)
_LEAK = re.compile(r"\b(given|provided|correct) (target|answer)\b", re.IGNORECASE)
_ENDING = re.compile(r"\bthe\s+target\s+is\s+(?:the\s+)?[^.!?]{1,60}\.$", re.IGNORECASE)


@dataclass(frozen=True)
class GateResult:
    """What a gate says of a reply."""

    status: Literal["accepted", "right", "refused"]
    """A refused reply is asked for again while tries are left; "right" is the corrector's verdict."""
    record: dict[str, Any] = field(default_factory=dict)
    """Fields of the row's line."""
    problems: tuple[str, ...] = ()
    """Why the reply was refused, by name."""


Gate = Callable[[Request, str], GateResult]
"""(request, text of the reply) -> result."""


def refused(*problems: str) -> GateResult:
    """A refusal with its reasons."""
    return GateResult("refused", problems=problems)


def tidy(text: str, style: Style) -> str:
    """A reply as training wants it: one paragraph, no heading, plain ending "the target is X."."""
    text = " ".join(text.replace("**", "").split())
    if style == "flexible":
        text = re.sub(r"^reasoning( process)?\s*:\s*", "", text, flags=re.IGNORECASE)
    return plain_conclusion(without_ending(text))


def problems_of_reasoning(text: str, target: str, style: Style) -> tuple[str, ...]:
    """Names of the gates that a tidied text fails, none for a good one."""
    failed = {
        "empty": not text,
        "too_short": 0 < len(text) < SHORTEST,
        "too_long": len(text) >= MAX_CHARACTERS,
        **{f"no_{step}_step": not words.search(text) for step, words in STEPS.items()},
        "no_ending": not _ENDING.search(text),
        "wrong_target": parse_answer(text) != target,
        "leaks_the_answer": bool(_LEAK.search(text)),
        "not_fixed_format": style == "fixed" and not FIXED.search(text),
    }
    return tuple(name for name, fails in failed.items() if fails)


def reasoning_gate(style: Style) -> Gate:
    """Gate of `scripts/generate_cot.py`: an accepted line is a reasoning record."""

    def gate(request: Request, reply: str) -> GateResult:
        text, target = tidy(reply, style), request.row.class_name
        problems = problems_of_reasoning(text, target, style)
        return refused(*problems) if problems else GateResult("accepted", {"reasoning": text, "target": target})

    return gate
