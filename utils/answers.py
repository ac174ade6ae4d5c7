"""What an answer says: the class that it names."""

from __future__ import annotations

import re

_PHRASE = re.compile(r"\bthe\s+target\s+is\b\s*:?\s*(?:the\s+)?", re.IGNORECASE)
"""Paper section 3.1, step 4: "the target is {class_name}"; the article is optional, as in the published code."""

_QUOTES = "\"'`*“”‘’«»"
_NAME = re.compile(rf"[{_QUOTES}]*\s*([^\W_](?:[\w\s-]|['’](?=\w))*)")
"""Words, digits, hyphens, underscores, inner apostrophes; anything else (a full stop, a quote, "[") ends the name."""

_NEXT_SENTENCE = re.compile(r"\s+it\s+is\b.*", re.IGNORECASE | re.DOTALL)


def parse_answer(text: str) -> str | None:
    """The class name X of the last "the target is X" in an answer, or None.

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
