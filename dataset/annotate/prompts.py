"""Prompts of the data engine, from template files (paper sections 6.1, 6.2 and 8.2).

A template may be replaced by another shipped one or a file of one's own (`--template`); {reference}, {target} and
{wrong} are filled in. The paper's texts are shipped word for word as `paper_6_1` and `paper_6_2` (to the second, which
names no place for them, the three inputs are added behind its end). The defaults depart from them as follows:

| paper | `cot_flexible`, `correct` | why |
|---|---|---|
| 6.1: the example ends "the correct target is ”violin”" | "the target is violin", and the ending is asked for in words | section 3.1 and the class reward read "the target is {class_name}" |
| 6.1: "the given Reference and Correct" | "... Reference and Target" | a slip |
| 6.2: the reference of the example stands in quotes | without quotes | quotes mark edits there |
| 6.2: marks within marks ("“should be “guitar” based ...”"); "The target is “man” but the correct answer ..." | marks once, "The target is ..." ends the answer | the gates refuse a reply that copies the paper's example: `marks_not_closed`, `wrong_target` |
"""  # noqa: E501 (a table)

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
        name: cot_flexible, cot_fixed, correct, classify, paper_6_1 or paper_6_2.
        own: the name of another shipped template, or a file, to use instead.

    Raises:
        DataError: the file cannot be read, or has no place for the reference.
    """
    shipped = FOLDER / f"{own or name}.txt"
    path = shipped if own is None or shipped.is_file() else own
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
