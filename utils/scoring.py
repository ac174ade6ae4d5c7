"""Predictions, keyed by metadata row -> scores of a split, of its question kinds and of its classes.

Every row is reduced where it was predicted to integers (protocols that pool rows) or to final values (protocols that do
not). Pooling happens afterwards in row order, so scores do not depend, to the bit, on how rows were spread over ranks.
All scores that leave this module are in percent, shares included; every score stands beside its number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.answers import well_formed
from utils.metrics import Counts, Scores, count_frames, fit_logits, fit_masks, get_protocol, score_counts
from utils.types import EMPTY_LOGIT, Prediction, Sample

Faithful = Callable[[str, dict, str], bool]
"""(answer, true facts of the row, reference) -> whether every step of the reasoning is right."""

NULL_CLASS = "null"
"""Class name in the uid of a row whose reference matches nothing (Ref-AVS metadata.csv)."""

ROW_PROTOCOL = "per_expression"
"""The protocol under which a single row has a score of its own; always computed."""

_SHORT_ANSWER = re.compile(r"(?:^|\s)It is (?P<name>[a-z][a-z -]*) \[SEG\]\.$")


@dataclass(frozen=True)
class RowResult:
    """What scoring keeps of one predicted row."""

    row: int
    uid: str
    split: str
    reference: str
    kind: str
    class_name: str
    """True class, from the uid; "" where the benchmark tells none (AVSBench MS3)."""
    text: str
    """The whole answer."""
    answer_class: str | None
    """Class named by the answer: X of "the target is X", else of "It is X [SEG]."."""
    has_seg: bool
    faithful: bool | None
    """Whether the reasoning is right; None where the true chain is unknown."""
    pieces: dict[str, Scores | Counts]
    """Protocol -> values of this row alone (one row per batch) or its counts, to be pooled with its neighbours'."""

    @property
    def well_formed(self) -> bool:
        """Whether the last sentence is "It is [SEG]", as the format reward asks (paper 3.3)."""
        return well_formed(self.text)

    @property
    def row_scores(self) -> Scores:
        """J, F, S of this row alone at native size."""
        scores = self.pieces[ROW_PROTOCOL]
        assert isinstance(scores, Scores)
        return scores

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON to the bit."""
        pieces = {k: p.pack() if isinstance(p, Counts) else [p.j, p.f, p.s] for k, p in self.pieces.items()}
        return {**{name: getattr(self, name) for name in _PLAIN}, "pieces": pieces}

    @staticmethod
    def from_json(record: dict[str, Any]) -> RowResult:
        """Inverse of `to_json`; further keys are ignored."""
        pieces = {k: Counts.unpack(p) if isinstance(p, str) else Scores(*p) for k, p in record["pieces"].items()}
        return RowResult(**{name: record[name] for name in _PLAIN}, pieces=pieces)


_PLAIN = ("row", "uid", "split", "reference", "kind", "class_name", "text", "answer_class", "has_seg", "faithful")


def score_row(
    sample: Sample, prediction: Prediction, protocols: Iterable[str], faithful: Faithful | None = None
) -> RowResult:
    """Reduce one prediction to what its scores need.

    Args:
        sample: with `masks` bool [T,H,W] at native size; `truth` where the true chain is known.
        prediction: `mask_logits` float [T,H,W]. An answer without [SEG] is scored as an empty mask.
        protocols: names; `ROW_PROTOCOL` is added.
        faithful: judges the reasoning of rows whose `truth` is known.

    Raises:
        ValueError: for a prediction of another row, or masks that cannot be scored; the row and uid are named.
    """
    if prediction.row != sample.row:
        raise ValueError(f"prediction of row {prediction.row} was paired with row {sample.row} ({sample.uid})")
    logits, masks = mask_logits(prediction), sample.masks
    if sample.labelled is not None:
        logits, masks = logits[list(sample.labelled)], masks[list(sample.labelled)]
    try:
        pieces = row_pieces(logits, masks, (*protocols, ROW_PROTOCOL))
    except ValueError as error:
        raise ValueError(f"row {sample.row} ({sample.uid}) cannot be scored: {error}") from error
    known = faithful is not None and sample.truth is not None
    return RowResult(
        row=sample.row,
        uid=sample.uid,
        split=sample.split,
        reference=sample.reference,
        kind=sample.kind,
        class_name=sample.class_name,
        text=prediction.text,
        answer_class=prediction.class_name or _short_answer(prediction.text),
        has_seg=prediction.has_seg,
        faithful=faithful(prediction.text, sample.truth, sample.reference) if known else None,
        pieces=pieces,
    )


def row_pieces(logits: Tensor, masks: Tensor, protocols: Iterable[str]) -> dict[str, Scores | Counts]:
    """What each protocol keeps of one row: final values where it pools no rows, else counts.

    Args:
        logits: float [T,H,W].
        masks: bool [T,H,W], of the same size unless every protocol compares at one size of its own.
        protocols: names.

    Raises:
        ValueError: see `metrics.count_frames`.
    """
    pieces: dict[str, Scores | Counts] = {}
    for name in dict.fromkeys(protocols):
        counts = count_frames(fit_logits(logits, name), fit_masks(masks, name), name)
        pieces[name] = score_counts(counts, name) if get_protocol(name).rows_per_batch == 1 else counts
    return pieces


def mask_logits(prediction: Prediction) -> Tensor:
    """The logits that count, float [T,H,W]: those of an answer without [SEG] are EMPTY_LOGIT everywhere."""
    logits = prediction.mask_logits
    return logits if prediction.has_seg else torch.full_like(logits, EMPTY_LOGIT)


def score_split(results: Iterable[RowResult], protocols: Sequence[str]) -> dict[str, Any]:
    """All scores of one split, its question kinds and its classes.

    Args:
        results: of the whole split in any order.
        protocols: names; each was given to `score_row`.

    Returns:
        `n`, `failed` (rows whose answer asked for no mask), `class_accuracy` (of the rows whose class is known, None
        without any), `format_share`, `faithful` with `faithful_n`, one entry per protocol, and the same under `kinds`
        and `classes` for each of these groups.
        A protocol's entry holds `J`, `F`, `J&F`, or only `S` where all rows are null, and `n`.

    Raises:
        ValueError: for no rows, or two results of one row.
    """
    ordered = sorted(results, key=lambda result: result.row)
    rows = [result.row for result in ordered]
    if not rows:
        raise ValueError("a split without predictions has no score")
    if len(set(rows)) != len(rows):
        doubled = sorted({row for row in rows if rows.count(row) > 1})
        raise ValueError(f"rows {doubled[:5]} were predicted twice; results are keyed by metadata row")
    return {
        **_group(ordered, protocols),
        "failed": [result.row for result in ordered if not result.has_seg],
        "kinds": {name: _group(group, protocols) for name, group in _split_by(ordered, "kind").items() if name},
        "classes": {name: _group(group, protocols) for name, group in _split_by(ordered, "class_name").items() if name},
    }


def pooled_scores(results: Sequence[RowResult], protocol: str) -> dict[str, float | int]:
    """J, F, J&F (or S of null rows) in percent of rows in the given order, batched as `protocol` says."""
    size = get_protocol(protocol).rows_per_batch
    if size == 1:
        batches = [result.pieces[protocol] for result in results]
    else:
        groups = [results[i : i + size] for i in range(0, len(results), size)]
        batches = [score_counts(Counts.concatenate([r.pieces[protocol] for r in group]), protocol) for group in groups]
    if all(result.class_name == NULL_CLASS for result in results):
        return {"S": _percent([b.s for b in batches]), "n": len(results)}
    j, f = _percent([b.j for b in batches]), _percent([b.f for b in batches])
    return {"J": j, "F": f, "J&F": (j + f) / 2, "n": len(results)}


def _short_answer(text: str) -> str | None:
    """X of "It is X [SEG].", the answer of a teacher."""
    found = _SHORT_ANSWER.search(text)
    return found["name"] if found else None


def _group(results: Sequence[RowResult], protocols: Sequence[str]) -> dict[str, Any]:
    judged = [result.faithful for result in results if result.faithful is not None]
    named = [result.answer_class == result.class_name for result in results if result.class_name]
    return {
        "n": len(results),
        "class_accuracy": _percent(named) if named else None,
        "format_share": _percent([result.well_formed for result in results]),
        "faithful": _percent(judged) if judged else None,
        "faithful_n": len(judged),
        **{protocol: pooled_scores(results, protocol) for protocol in protocols},
    }


def _split_by(results: Sequence[RowResult], field: str) -> dict[str, list[RowResult]]:
    groups: dict[str, list[RowResult]] = {}
    for result in results:
        groups.setdefault(getattr(result, field), []).append(result)
    return dict(sorted(groups.items()))


def _percent(values: Sequence[float | bool]) -> float:
    return 100 * float(np.mean(np.asarray(values, np.float64)))
