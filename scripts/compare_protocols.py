"""How much each choice of an evaluation protocol moves the scores of one and the same predictions.

    python train_ds_test.py --config configs/mini/eval.yaml eval.save_probabilities=true eval.output_dir=runs/choices
    python scripts/compare_protocols.py --pred runs/choices/test_s/probabilities --data data/mini --split test_s

Starts from protocol official and changes one choice at a time; the last lines are the other protocols whole. --pred is
read as scripts/evaluate_masks.py reads it; probabilities say more than masks, which have one threshold only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the project's root must be on the path first
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dataset.media import read_frames  # noqa: E402
from dataset.predictions import PredictionFolder, read_prediction  # noqa: E402
from dataset.refavs import RefAvsIndex  # noqa: E402
from dataset.truth import read_truth  # noqa: E402
from utils.errors import AuroraError  # noqa: E402
from utils.metrics import PROTOCOLS, Counts, Protocol, count_frames, fit_logits, fit_masks, score_counts  # noqa: E402
from utils.scoring import EMPTY_LOGIT  # noqa: E402
from utils.tables import Cell, format_table, signed  # noqa: E402

OFFICIAL = PROTOCOLS["official"]


@dataclass(frozen=True)
class Choice:
    """One way to score: a protocol, and what no protocol of ours does."""

    label: str
    protocol: Protocol
    hard: bool = False
    """Masks are cut at probability 0.5 before they are resized."""
    per_frame: bool = False
    """One maximum of F and one root of S per frame; frames without an object are left out of F."""


CHOICES = (
    Choice("official", OFFICIAL),
    Choice("J above 0.5, not 0.4", replace(OFFICIAL, j_threshold=0.5)),
    Choice("ground truth resized by nearest", replace(OFFICIAL, mask_rule="nearest")),
    Choice("224 px, not 256", replace(OFFICIAL, size=224)),
    Choice("native size", replace(OFFICIAL, size=None)),
    Choice("masks cut at 0.5 before resizing", OFFICIAL, hard=True),
    Choice("16 rows pooled, not 4", replace(OFFICIAL, rows_per_batch=16)),
    Choice("each row by itself", replace(OFFICIAL, rows_per_batch=1)),
    Choice("each frame by itself", OFFICIAL, per_frame=True),
    Choice("per_expression", PROTOCOLS["per_expression"]),
    Choice("AVSBench's conventions (s4)", PROTOCOLS["s4"]),
)


def score_choice(rows: Sequence[Counts], choice: Choice) -> tuple[float, float, float]:
    """(J, F, S) in percent of rows in order, each reduced under the choice's protocol."""
    size = choice.protocol.rows_per_batch
    if choice.per_frame:
        batches = [frame for row in rows for frame in _frames(row)]
    else:
        batches = [Counts.concatenate(rows[i : i + size]) if size > 1 else rows[i] for i in range(0, len(rows), size)]
    scores = [score_counts(batch, choice.protocol) for batch in batches]
    shown = [s.f for s, batch in zip(scores, batches, strict=True) if batch.gt_histogram.any() or not choice.per_frame]
    values = ([s.j for s in scores], shown, [s.s for s in scores])
    return tuple(100 * float(np.mean(v)) if v else 0.0 for v in values)


def _frames(row: Counts) -> list[Counts]:
    parts = (row.histogram, row.gt_histogram, row.above_half)
    return [Counts(*(part[t : t + 1] for part in parts), row.pixels) for t in range(len(row))]


def measure(pred: Path, data: Path, split: str) -> list[tuple[str, float, float, float]]:
    """(label, J, F, S) of every choice, in percent.

    Raises:
        DataError: predictions or data are missing or faulty.
    """
    index = RefAvsIndex(data)
    predictions = PredictionFolder(pred, index.rows(split))
    kept: dict[Choice, list[Counts]] = {choice: [] for choice in CHOICES}
    for row in tqdm(predictions.rows, desc=split, mininterval=1.0, disable=not sys.stderr.isatty()):
        size = tuple(read_frames(index.frames_folder(row.clip), 1).shape[1:3])
        truth = torch.from_numpy(read_truth(index, row, size)[0])
        soft = read_prediction(predictions.folder(row), len(truth), [size])
        hard = torch.where(soft > 0, -EMPTY_LOGIT, EMPTY_LOGIT)
        for choice, counts in kept.items():
            logits = hard if choice.hard else soft
            rule = choice.protocol
            counts.append(count_frames(fit_logits(logits, rule), fit_masks(truth, rule), rule))
    return [(choice.label, *score_choice(counts, choice)) for choice, counts in kept.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--pred", type=Path, required=True, help="folder of probability maps")
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmark (Ref-AVS layout)")
    parser.add_argument("--split", default="test_s", help="split to score (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.pred, options.data, options.split)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    _, j0, f0, s0 = found[0]
    rows: list[list[Cell]] = []
    for label, j, f, s in found:
        if options.split == "test_n":
            rows.append([label, s, signed(s - s0, 2)])
        else:
            rows.append([label, j, signed(j - j0, 2), f, signed(f - f0, 2)])
    header = ["S", "change"] if options.split == "test_n" else ["J", "change", "F", "change"]
    print(format_table([options.split, *header], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
