"""Quality gates of written reasoning (paper section 3.1: four steps; section 8.2: flexible or fixed format)."""

from __future__ import annotations

import re

from dataset.annotate.backend import Reply, Request
from dataset.annotate.engine import Judge, Verdict
from dataset.annotate.prompts import Style
from dataset.cot import MAX_CHARACTERS
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


def tidy(text: str, style: Style) -> str:
    """A reply as training wants it: one paragraph, no heading, plain ending "the target is X."."""
    text = " ".join(text.replace("**", "").split())
    if style == "flexible":
        text = re.sub(r"^reasoning( process)?\s*:\s*", "", text, flags=re.IGNORECASE)
    return plain_conclusion(without_ending(text))


def problems(text: str, target: str, style: Style) -> tuple[str, ...]:
    """Names of the gates that a tidied text fails, none for a good one."""
    found = [] if text else ["empty"]
    if 0 < len(text) < SHORTEST:
        found.append("too_short")
    if len(text) >= MAX_CHARACTERS:
        found.append("too_long")
    found += [f"no_{step}_step" for step, words in STEPS.items() if not words.search(text)]
    if not _ENDING.search(text):
        found.append("no_ending")
    if parse_answer(text) != target:
        found.append("wrong_target")
    if _LEAK.search(text):
        found.append("leaks_the_answer")
    if style == "fixed" and not FIXED.search(text):
        found.append("not_fixed_format")
    return tuple(found)


def writer_judge(style: Style) -> Judge:
    """Judge of `scripts/generate_cot.py`: an accepted line is a reasoning record."""

    def judge(request: Request, reply: Reply) -> Verdict:
        text = tidy(reply.text, style)
        target = request.row.class_name
        found = problems(text, target, style)
        return Verdict("refused", {}, found) if found else Verdict("accepted", {"reasoning": text, "target": target})

    return judge
