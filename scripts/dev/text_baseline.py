"""How much of a Ref-AVS score the references alone give away (null rows above all): a baseline that reads text only.

    python scripts/dev/text_baseline.py --data data/refavs

Ref-AVS writes all its null references as one of a few fixed phrases without a final full stop, so that a rule on text
finds them; a score on test_n is worth only what it has beyond this baseline. Naive Bayes over the words of the
reference and the whole phrase, with add-one smoothing; the final stop may count as a word, or be left out.

Learns from the training rows of metadata.csv and judges the other splits, with the final full stop of the references
and without it. No media are read.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataset.refavs import NULL_CLASS, RefAvsIndex, Row, Split  # noqa: E402 - the project's root must be on the path first
from utils.errors import DataError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.tables import Cell, format_table  # noqa: E402

JUDGED = (Split.VAL, Split.TEST_S, Split.TEST_U, Split.TEST_N)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Learn from the training rows, score the others, print and write the table."""
    index = RefAvsIndex(options.data)
    learned = index.rows(Split.TRAIN)
    if not learned:
        raise DataError(f"{index.table}: no row of split train. Remedy: use the whole table.")
    table: list[list[Cell]] = []
    kept: dict[str, dict[str, object]] = {}
    for full_stop in (True, False):
        baseline = TextBaseline(learned, full_stop)
        name = "with the final stop" if full_stop else "without it"
        kept[name] = {}
        for split in JUDGED:
            scores = baseline.score(index.rows(split))
            kept[name][str(split)] = asdict(scores)
            table.append([f"{split}, {name}", *asdict(scores).values()])
    print(format_table(["split", "rows", "null", "null found", "null claimed", "class", "S"], table))
    print("percent; S of a model that trusts this baseline and marks every pixel of the other clips (100: no help)")
    if options.json is not None:
        write_json(options.json, {"data": str(options.data), "learned": len(learned), "scores": kept})


if __name__ == "__main__":
    sys.exit(main())
