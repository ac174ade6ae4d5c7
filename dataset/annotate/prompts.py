"""Prompts of the data engine, from template files (paper sections 6.1, 6.2 and 8.2).

A template may be replaced by a file of one's own; {reference}, {target} and {wrong} are filled in. Departures from the
paper's texts: the wanted ending "the target is X" is said in words, since training parses it; the reference in the
example of 6.2 stands without quotes, since quotes mark edits there; "given Reference and Correct" reads "... Target".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from utils.errors import DataError

FOLDER = Path(__file__).parent / "templates"
Style = Literal["flexible", "fixed"]
WRITER_FRAMES = (0, 4, 9)
"""1 s, 5 s and 10 s (paper section 6.1)."""
CORRECTOR_FRAMES = 10
"""Paper section 6.2."""
_SLOT = re.compile(r"\{(reference|target|wrong)\}")


def read_template(name: str, own: Path | None = None) -> str:
    """A template's text.

    Args:
        name: cot_flexible, cot_fixed, correct or classify.
        own: a file to use instead.

    Raises:
        DataError: the file cannot be read, or has no place for the reference.
    """
    path = own or FOLDER / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}. Remedy: name a readable UTF-8 template.") from error
    if "{reference}" not in text:
        raise DataError(f"{path}: has no {{reference}}. Remedy: say where the reference goes.")
    return text


def fill(template: str, **values: str) -> str:
    """The template with its slots filled in one pass: braces inside a value stay as they are.

    Raises:
        DataError: the template has a slot without a value.
    """
    missing = {m[1] for m in _SLOT.finditer(template)} - values.keys()
    if missing:
        raise DataError(f"the template asks for {', '.join(sorted(missing))}, which this command does not know. "
                        "Remedy: remove the slot.")  # fmt: skip
    return _SLOT.sub(lambda m: values[m[1]], template)
