"""The authors' released text files, converted once into records that name their rows.

The release has one loader for stages 1 and 2 (utils/sem_seg_dataset.py:386-407): a JSON list of objects with the key
`reasoning`, joined with the train rows by position. What divides wrong path, trigger and corrected path is not marked
in the stage-2 list, and no trigger is spelled in the code, so they are found by what they say (`split_text`). That file
was not at hand: the form of its elements is the loader's, or plain texts; objects may name their `row`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from dataset.records import TRIGGERS, CotRecord, TooLong, build_path, clean_reasoning, fits, raise_faults, without_seg
from dataset.refavs import RefAvsIndex, Row, Split
from utils.answers import parse_answer, plain_conclusion
from utils.errors import DataError

_log = logging.getLogger("aurora.data")
_SENTENCE = re.compile(r"\S.*?(?:(?:[.!?…]+[\"'”’]*(?=\s|$))|$)", re.DOTALL)
_OPENING = re.compile(
    r"(?:but\s+|hmm,?\s+|no,\s+|actually,?\s+)?(?:wait\b|hold on\b|hmm\b|on second thought|looking again|is that right|"
    r"let me (?:re|check|double|correct|verify|go through|step back|question|look)|thinking about it again|"
    r"(?:i|we) (?:need|should|must|have) (?:to )?(?:re|not rely|look)|before i answer|that cannot be right)",
    re.IGNORECASE,
)


def import_reasoning(
    path: str | Path, index: RefAvsIndex, split: Split = Split.TRAIN, too_long: TooLong = "error"
) -> list[CotRecord]:
    """Records of the released stage-1 list, in its order, the target being the row's class.

    Conclusions such as "the correct target is “X”" (the example of the paper's section 6.1) become "the target is X.",
    the words of section 3.1; their number is logged.

    Args:
        path: the JSON list.
        index: the official metadata; its rows of `split` (14,113 for train) must be as many as the elements.
        split: the split that the file was made for.
        too_long: as in `read_cot`; too long elements are counted but left out with "drop", as in the released code.

    Raises:
        DataError: no list of that many elements, an empty or too long reasoning (with its position).
    """
    records, faults, changed = [], [], 0
    for position, (row, reasoning) in enumerate(_joined(Path(path), index, split)):
        try:
            text = clean_reasoning(reasoning)
            if fits(text, too_long):
                plain = plain_conclusion(text)
                changed += plain != text
                records.append(CotRecord(row.row, row.uid, plain, row.class_name))
        except ValueError as error:
            faults.append(f"{path}, element {position} (row {row.row}, {row.uid}): {error}")
    raise_faults(faults)
    _log.info('%d of %d conclusions rewritten as "the target is X."', changed, len(records))
    return records


def import_reflective(
    path: str | Path, index: RefAvsIndex, split: Split = Split.TRAIN
) -> tuple[list[CotRecord], list[tuple[int, str]]]:
    """Reflective paths of the released stage-2 list, and (metadata row, why) of the texts that cannot be split.

    Raises:
        DataError: no list of as many elements as the split has rows, a row that does not exist or is named twice.
    """
    paths, left = [], []
    for row, text in _joined(Path(path), index, split):
        try:
            if not isinstance(text, str):
                raise ValueError("holds no text")
            wrong, phrase, corrected = split_text(without_seg(text))
            if parse_answer(corrected) != row.class_name:
                raise ValueError("what follows the trigger does not end in the row's class")
        except ValueError as error:
            left.append((row.row, str(error)))
            continue
        paths.append(build_path(row.row, row.uid, row.class_name, wrong, corrected, phrase=phrase))
    return paths, left


def split_text(text: str) -> tuple[str, str, str]:
    """A finished text as (wrong path, trigger, corrected path).

    The trigger is the sentence, or the sentences in a row, that opens as one of `dataset.records.TRIGGERS` or as
    "Wait, ..." (paper 3.2) does, behind a path that has named a target.

    Raises:
        ValueError: why there is no such sentence, or more than one.
    """
    spans = [found.span() for found in _SENTENCE.finditer(text)]
    opening = [i for i, (a, b) in enumerate(spans) if _OPENING.match(text, a) or text[a:b] in TRIGGERS]
    if not opening:
        raise ValueError("no sentence opens as a trigger does")
    behind = [i for i in opening if parse_answer(text[: spans[i][0]]) is not None]
    if not behind:
        raise ValueError("no target is named before the trigger")
    first = last = behind[0]
    while last + 1 in behind:
        last += 1
    if last != behind[-1]:
        raise ValueError("several places open as a trigger does")
    start, end = spans[first][0], spans[last][1]
    return text[:start].strip(), text[start:end].strip(), text[end:].strip()


def _joined(path: Path, index: RefAvsIndex, split: Split) -> list[tuple[Row, Any]]:
    """(row, text) of each element: element i belongs to the i-th row of the split, unless all name their rows."""
    try:
        elements = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no JSON file ({error}). Remedy: download the released file again.") from error
    if not isinstance(elements, list):
        raise DataError(f"{path}: a {type(elements).__name__}, not a list. Remedy: name the authors' released file.")
    rows: list[Row | None] = index.rows(split)
    if elements and all(isinstance(e, dict) and isinstance(e.get("row"), int) for e in elements):
        rows = [index.row(e["row"]) for e in elements]
    elif len(elements) != len(rows):
        raise DataError(
            f"{path}: {len(elements)} elements, but split {split} has {len(rows)} rows, and not every element names "
            "its row: they cannot be joined. Remedy: use the file and the metadata.csv of one release, or add the "
            "metadata row to each element as `row`."
        )
    joined: dict[int, tuple[Row, Any]] = {}
    for position, (element, row) in enumerate(zip(elements, rows, strict=True)):
        if row is None or row.row in joined:
            rule = "does not exist" if row is None else "is named twice"
            raise DataError(f"{path}, element {position}: its row {rule}. Remedy: use the metadata.csv of its release.")
        joined[row.row] = row, element.get("reasoning") if isinstance(element, dict) else element
    return list(joined.values())
