"""What the reference alone gives away: a baseline that neither sees nor hears, trained on the training split.

Ref-AVS writes all its null references as one of a few fixed phrases without a final full stop, so that a rule on text
finds them; a score on test_n is worth only what it has beyond this baseline. Naive Bayes over the words of the
reference and the whole phrase, with add-one smoothing; the final stop may count as a word, or be left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.refavs import NULL_CLASS, Row

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_STOP, _NO_STOP = "<stop>", "<no stop>"


@dataclass(frozen=True)
class TextScores:
    """What the baseline says about one split; shares in percent, None without such rows."""

    rows: int
    null_rows: int
    null_found: float | None
    """Of the null rows, those called null."""
    null_claimed: float | None
    """Of the other rows, those called null."""
    class_accuracy: float | None
    """Of the other rows, those whose class is named."""
    s: float | None
    """S of a model that leaves the mask empty where the baseline says null, and marks every pixel of other clips:
    mean over batches of 4 null rows, sqrt(share of rows not found); 100 without any help of the text."""


class TextBaseline:
    """Class of a row (NULL_CLASS among them) from its reference.

    Args:
        rows: to learn from.
        full_stop: whether the final full stop counts.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, rows: Sequence[Row], full_stop: bool = True) -> None:
        if not rows:
            raise ValueError("no rows to learn from")
        self.full_stop = full_stop
        self._words: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            self._words[row.class_name].update(self.words(row.reference))
        self._rows = Counter(row.class_name for row in rows)
        self._totals = {name: words.total() for name, words in self._words.items()}
        self._vocabulary = len({word for words in self._words.values() for word in words})

    def words(self, reference: str) -> list[str]:
        """Lower-case words of a reference, all of them as one phrase, and how it ends if that counts."""
        mark = [_STOP if reference.endswith(".") else _NO_STOP] if self.full_stop else []
        words = _WORD.findall(reference.lower())
        return [*words, " ".join(words), *mark]

    def predict(self, reference: str) -> str:
        """The most probable class; the first by name of several."""
        words = self.words(reference)

        def log_probability(name: str) -> float:
            counts, total = self._words[name], self._totals[name] + self._vocabulary
            return math.log(self._rows[name]) + sum(math.log((counts[word] + 1) / total) for word in words)

        return max(sorted(self._rows), key=log_probability)

    def score(self, rows: Sequence[Row]) -> TextScores:
        """Judge the rows of a split, in file order."""
        named = [self.predict(row.reference) for row in rows]
        pairs = list(zip(rows, named, strict=True))
        nulls = [name == NULL_CLASS for row, name in pairs if row.is_null]
        others = [(row, name) for row, name in pairs if not row.is_null]
        batches = [nulls[i : i + 4] for i in range(0, len(nulls), 4)]
        return TextScores(
            rows=len(rows),
            null_rows=len(nulls),
            null_found=_percent(nulls),
            null_claimed=_percent([name == NULL_CLASS for _, name in others]),
            class_accuracy=_percent([name == row.class_name for row, name in others]),
            s=_percent([math.sqrt(1 - sum(batch) / len(batch)) for batch in batches]),
        )


def _percent(values: Sequence[float | bool]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
