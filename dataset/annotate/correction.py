"""The corrector's two-part answer: verdict, marks, minimal modification (paper sections 3.2 and 6.2)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from dataset.annotate.backends import Request
from dataset.annotate.gates import Gate, GateResult, refused, tidy
from dataset.records import MAX_CHARACTERS, without_seg
from utils.answers import parse_answer

_FIRST = re.compile(r"\(\s*1\s*\)\s*(?:the original\b[^:\n]{0,40}:)?", re.IGNORECASE)
_SECOND = re.compile(r"\(\s*2\s*\)\s*your corrected answer\s*:?", re.IGNORECASE)
_SECOND_BARE = re.compile(r"\(\s*2\s*\)\s*(?:(?:the )?corrected(?: answer)?\s*:)?", re.IGNORECASE)
_RIGHT = re.compile(r"^[\s\"'“”‘’*]*right[\s\"'“”‘’*.!]*$", re.IGNORECASE)
_MARKED = re.compile(r"“([^“”\"]*)”|\"([^\"]*)\"")
_QUOTES = re.compile("[“”\"]")


@dataclass(frozen=True)
class Correction:
    """A corrected path."""

    wrong: str
    corrected: str
    wrong_spans: tuple[tuple[int, int], ...]
    """Marked characters [start, end) of `wrong`; those behind a place where the service misquoted it are left out."""
    corrected_spans: tuple[tuple[int, int], ...]
    """Likewise of `corrected`."""
    edit_ratio: float
    """Words changed, added or deleted over the longer path's words, in [0, 1]."""


def split_parts(text: str) -> tuple[str, str] | None:
    """(marked original, marked correction), or None if the answer does not have the two parts."""
    text = text.replace("**", "")
    first = _FIRST.search(text)
    if first is None:
        return None
    seconds = list(_SECOND.finditer(text, first.end())) or list(_SECOND_BARE.finditer(text, first.end()))
    if not seconds:
        return None
    second = seconds[-1]
    original, corrected = text[first.end() : second.start()].strip(), text[second.end() :].strip()
    return (original, corrected) if original and corrected else None


def unmark(text: str, own: tuple[str, ...] = ()) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Text without its marks, and the marked characters [start, end) of the result.

    Args:
        text: with marks in straight or curly double quotes.
        own: quoted passages of the original path, which are quotations and stay.

    Raises:
        ValueError: a mark is not closed.
    """
    plain, outside, spans, end = "", "", [], 0
    for match in _MARKED.finditer(text):
        before, inner = text[end : match.start()], match[1] if match[1] is not None else match[2]
        plain, outside, end = plain + before, outside + before, match.end()
        if inner in own:
            inner = match[0]
        elif inner:
            spans.append((len(plain), len(plain) + len(inner)))
        plain += inner
    if _QUOTES.search(outside + text[end:]):
        raise ValueError("a mark is not closed")
    return plain + text[end:], tuple(spans)


def edit_ratio(a: str, b: str) -> float:
    """Word-level Levenshtein distance over the number of words of the longer text; 0 = equal, 1 = nothing kept."""
    left, right = a.split(), b.split()
    if not left or not right:
        return float(left != right)
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1] / max(len(left), len(right))


def parse_correction(text: str, wrong: str) -> Correction | None:
    """The correction that a two-part answer holds; None without the two parts.

    Raises:
        ValueError: a mark is not closed.
    """
    parts = split_parts(text)
    if parts is None:
        return None
    wrong = without_seg(wrong)
    own = tuple(curly or straight for curly, straight in _MARKED.findall(wrong))
    (first, first_spans), (second, second_spans) = (unmark(" ".join(part.split()), own) for part in parts)
    corrected = without_seg(tidy(second, "fixed"))
    # a span holds for the final text too where both are equal up to its end
    wrong_spans = tuple(span for span in first_spans if first[: span[1]] == wrong[: span[1]])
    corrected_spans = tuple(span for span in second_spans if second[: span[1]] == corrected[: span[1]])
    return Correction(wrong, corrected, wrong_spans, corrected_spans, edit_ratio(wrong, corrected))


def correction_gate(max_ratio: float) -> Gate:
    """Gate of `scripts/correct_paths.py`.

    Args:
        max_ratio: largest edit ratio that still counts as minimal modification (Yu et al. 2024, paper section 3.2).
    """

    def gate(request: Request, reply: str) -> GateResult:
        target = request.row.class_name
        if not reply.strip():
            return refused("empty")
        if _RIGHT.match(reply):
            # a mined path names another class than the true one, so "right" contradicts the data: kept apart
            return GateResult("right", {"wrong": without_seg(request.wrong), "target": target})
        try:
            found = parse_correction(reply, request.wrong)
        except ValueError:
            return refused("marks_not_closed")
        if found is None:
            return refused("no_two_parts")
        failed = {
            "wrong_target": parse_answer(found.corrected) != target,
            "unchanged": found.corrected == found.wrong,
            "not_minimal": found.edit_ratio > max_ratio,
            "too_long": len(found.corrected) >= MAX_CHARACTERS,
        }
        if any(failed.values()):
            return refused(*(name for name, fails in failed.items() if fails))
        return GateResult("accepted", {"target": target, **asdict(found), "edit_ratio": round(found.edit_ratio, 4)})

    return gate
