"""What an answer says: whether it ends as it must, and the class that it names.

| rule | paper | released code | here |
|---|---|---|---|
| format | the final sentence is "It is [SEG]" (3.3) | the text ends with "It is [SEG]." (LISA_grpo.py:159-165) | the paper's, for reward and evaluation: `well_formed` |
| class | "the target is {class_name}" (3.1) | one word of the second-to-last piece (LISA_grpo.py:173-176) | the whole name behind the last such phrase: `parse_answer` |
"""  # noqa: E501 (a table)

from __future__ import annotations

import re

_TARGET_IS = r"\bthe\s+(?:correct\s+|final\s+)?target\s+is\b"
_PHRASE = re.compile(rf"{_TARGET_IS}\s*:?\s*(?:the\s+)?", re.IGNORECASE)
"""Paper section 3.1, step 4: "the target is {class_name}"; the article is optional, as in the released code. Texts that
were written after the example of section 6.1 say "the correct target is" instead."""

_QUOTES = "\"'`*“”‘’«»"
_NAME = re.compile(rf"[{_QUOTES}]*\s*([^\W_](?:[\w\s-]|['’](?=\w))*)")
"""Words, digits, hyphens, underscores, inner apostrophes; anything else (a full stop, a quote, "[") ends the name."""

_NEXT_SENTENCE = re.compile(r"\s+it\s+is\b.*", re.IGNORECASE | re.DOTALL)


ENDING = "It is [SEG]."
"""What every answer ends in (paper 3.1); `[SEG]` stands for the token of the loaded tokenizer."""
_WELL_FORMED = re.compile(rf"(?:^|[.!?\n][{_QUOTES})]*)\s*It is \[SEG\]\.?\s*$")
_ENDING = re.compile(r"\s*It is \[SEG\]\s*\.?\s*$", re.IGNORECASE)


def well_formed(text: str) -> bool:
    """Whether the last sentence of an answer is exactly "It is [SEG]" (paper 3.3); its full stop is optional.

    A sentence ends at ".", "!", "?" or a line break; quotes and brackets that close behind the mark belong to it. The
    released code asks for the last characters alone, so that "..., so It is [SEG]." passes there.
    """
    return _WELL_FORMED.search(text) is not None


_CONCLUSION = re.compile(
    rf"\b(the)\s+(?:correct\s+|final\s+)?target\s+is\s+(the\s+)?[{_QUOTES}]*([^{_QUOTES}.\n]+?)[{_QUOTES}]*\s*[.!]*\s*[{_QUOTES}]*$",
    re.IGNORECASE,
)


def plain_conclusion(reasoning: str) -> str:
    """A reasoning with its end, "the correct target is “X”" (paper 6.1) or the like, as "the target is X." (3.1)."""
    return _CONCLUSION.sub(lambda m: f"{m[1]} target is {m[2] or ''}{m[3].strip()}.", reasoning)


def without_ending(text: str) -> str:
    """An answer without its last "It is [SEG].", in any case of letters, and without outer spaces."""
    return _ENDING.sub("", text).strip()


def parse_answer(text: str) -> str | None:
    """The class name X of the last "the target is X" (or "the correct target is X") in an answer, or None.

    X may have several words and hyphens, may be preceded by "the" and stand in quotes; it ends at the first character
    that is no part of a name, at a line break, or where "It is" begins. The last occurrence counts, because a
    reflective path names a wrong object before it corrects itself (paper eq. 3). Departs from the published class
    reward, which reads one word of the second-to-last sentence, so that no hyphenated class can score
    (LISA_grpo.py:173-176).

    Args:
        text: a decoded answer.

    Returns:
        X in lower case with single spaces, comparable with `Sample.class_name`; None if no occurrence names anything.
    """
    for phrase in reversed(list(_PHRASE.finditer(text))):
        found = _NAME.match(text, phrase.end())
        if found is None:
            continue
        name = _NEXT_SENTENCE.sub("", found[1].split("\n")[0])
        if name.strip(" -_"):
            return " ".join(name.lower().split()).strip(" -_")
    return None


_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_SIGNS = (
    ("answer", re.compile(rf"{_TARGET_IS}|\[SEG\]", re.IGNORECASE)),
    ("reflection", re.compile(r"\b(?:wait|re-?evaluat\w*|re-?examin\w*|re-?consider\w*|on second thought)\b", re.I)),
    ("reference", re.compile(r"\breference\b", re.IGNORECASE)),
)
_SENSES = re.compile(
    r"\b(?:(?P<audio>audio|sounds?|sounding|hear\w*|listen\w*|silen\w*|loud\w*|quiet\w*|noise|voices?)"
    r"|(?P<video>images?|videos?|frames?|see|seen|sees|shows?|visible|visual\w*|scene|left|right|middle))\b",
    re.IGNORECASE,
)


def sentences(answer: str) -> list[str]:
    """An answer cut after each full stop, exclamation or question mark."""
    return [part for part in _SENTENCE.split(answer.strip()) if part]


def reasoning_steps(answer: str, reference: str) -> list[tuple[str, str]]:
    """An answer as (step, text): the paper's video, audio, reference and answer, in the order in which they are said.

    The steps carry no marks in the text (paper section 3.1), so they are told by their words: the answer names the
    target, the reference step repeats the reference or speaks of it, the other two are told by the first word about
    sight or sound. A sentence without any such word continues the step before it; "reflection" marks a change of mind
    (paper eq. 3). For reading only: no score depends on it.

    Args:
        answer: the whole answer.
        reference: the referring expression.
    """
    asked = " ".join(reference.lower().strip().rstrip(".").split())
    steps: list[tuple[str, str]] = []
    for sentence in sentences(answer):
        name = next((name for name, sign in _SIGNS if sign.search(sentence)), None)
        if name is None and asked and asked in " ".join(sentence.lower().split()):
            name = "reference"
        if name is None:
            found = _SENSES.search(sentence)
            name = found.lastgroup if found else steps[-1][0] if steps else "video"
        if steps and steps[-1][0] == name:
            sentence = f"{steps.pop()[1]} {sentence}"
        steps.append((name, sentence))
    return steps
