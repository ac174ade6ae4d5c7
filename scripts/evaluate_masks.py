"""Score the masks of any method, exactly as train_ds_test.py scores ours.

    python scripts/evaluate_masks.py --pred runs/other/masks --data data/refavs --split test_s --protocol official

--pred holds one folder per row, named by row number (00012), by uid, or as the ground truth (<clip>/fid_<fid>), with
one 8 or 16 bit grey PNG per frame (0.png or 00000.png): a mask of 0 and 255, or a probability as a share of the largest
value. Images have the clip's own size or, where the protocol compares at one size, that (official: 256x256).

Masks written by eval.save_masks are already cut at probability 0.5: their J under per_expression is that of the run to
the bit, their other scores are those of hard masks. Probabilities written by eval.save_probabilities keep 16 bits.

The published numbers of the paper's Table 1 (Table 6 for AVSBench S4) are printed beside the result, where the data are
not synthetic (the mini world or its S4).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the project's root must be on the path first
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configs.schema import DataConfig  # noqa: E402
from dataset.loader import build_index, init_worker  # noqa: E402
from dataset.media import ClipIndex, read_frames, read_truth  # noqa: E402
from dataset.predictions import PredictionFolder, read_prediction  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.metrics import PROTOCOLS  # noqa: E402
from utils.paper import TABLE_1, TABLE_6  # noqa: E402
from utils.report.runs import is_mini  # noqa: E402
from utils.scoring import EMPTY_LOGIT, RowResult, row_pieces, score_split  # noqa: E402
from utils.tables import Cell, format_table  # noqa: E402

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded."""
BENCHMARK_OF = {"s4": "avsbench_s4", "ms3": "avsbench_ms3"}
"""Protocol -> its benchmark, where that is not Ref-AVS."""


class ScoredRows(Dataset[RowResult]):
    """Row i of a split, read and reduced to what its scores need; a row without a folder is an empty mask."""

    def __init__(self, index: ClipIndex, predictions: PredictionFolder, options: argparse.Namespace) -> None:
        self.index, self.predictions, self.options = index, predictions, options
        sides = {PROTOCOLS[name].size for name in options.protocol}
        self.side = sides.pop() if len(sides) == 1 else None
        """Of images that need not have the clip's own size: that at which every protocol compares."""

    def __len__(self) -> int:
        return len(self.predictions.rows)

    def __getitem__(self, i: int) -> RowResult:
        row, options = self.predictions.rows[i], self.options
        folder = self.predictions.folder(row)
        try:
            size = tuple(read_frames(self.index.frames_folder(row.clip), 1, MAX_PIXELS).shape[1:3])
            truth, labelled = read_truth(self.index, row, size, options.num_frames, MAX_PIXELS)
            logits = torch.full(truth.shape, EMPTY_LOGIT)
            if folder.is_dir():
                allowed = [size, *([(self.side, self.side)] if self.side else [])]
                logits = read_prediction(folder, len(truth), list(dict.fromkeys(allowed)), options.kind, MAX_PIXELS)
            chosen = list(range(len(truth)) if labelled is None else labelled)
            pieces = row_pieces(logits[chosen], torch.from_numpy(truth)[chosen], options.protocol)
        except (DataError, ValueError) as error:
            raise DataError(f"row {row.row} ({row.uid}): {error}") from error
        told = (row.row, row.uid, str(row.split), row.reference, row.kind, row.class_name)
        return RowResult(*told, text="", answer_class=None, has_seg=folder.is_dir(), faithful=None, pieces=pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--pred", type=Path, required=True, help="folder of the predicted masks")
    parser.add_argument("--data", required=True, help="folder of the benchmark")
    parser.add_argument("--split", default="test_s", help="split to score (default: %(default)s; AVSBench: test)")
    parser.add_argument("--protocol", nargs="+", choices=list(PROTOCOLS), default=["official"], help="one or several")
    parser.add_argument("--kind", choices=["auto", "masks", "probabilities"], default="auto", help="of the images")
    parser.add_argument("--missing", choices=["error", "empty"], default="error", help="rows without a folder")
    parser.add_argument("--num_frames", type=int, help="frames per clip, evenly spaced, if not all were predicted")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and score (default: this one)")
    parser.add_argument("--json", type=Path, help="also write all scores to this file")
    options = parser.parse_args(arguments)
    return run_command(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    """Score, and print the table with the numbers that may stand beside it."""
    scores = evaluate(options)
    mini = is_mini(path.name for path in Path(options.data).iterdir())
    print(comparison(scores, options.split, options.protocol, mini))


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the folder, in percent (see `scoring.score_split`); a warning for rows that were not predicted."""
    benchmarks = {BENCHMARK_OF.get(name, "refavs") for name in options.protocol if name != "per_expression"}
    if len(benchmarks) > 1:
        raise DataError(f"--protocol {' '.join(options.protocol)}: of two benchmarks. Remedy: name one.")
    index = build_index(DataConfig(benchmark=benchmarks.pop() if benchmarks else "refavs", root=options.data))
    try:
        rows = index.rows(options.split)
    except ValueError as error:
        remedy = "train, val, test_s, test_u or test_n"
        raise DataError(f"--split {options.split}: {error}. Remedy: {remedy}.") from error
    predictions = PredictionFolder(options.pred, rows)
    missing = predictions.missing
    if missing and options.missing == "error":
        raise DataError(
            f"{options.pred}: {len(missing)} of {len(rows)} rows have no folder, first row {missing[0].row}: "
            f"{predictions.folder(missing[0])}. Remedy: write them, or score them as empty masks (--missing empty)."
        )
    loader = DataLoader(
        ScoredRows(index, predictions, options), batch_size=None, num_workers=options.workers,
        worker_init_fn=init_worker,
    )  # fmt: skip
    results = list(tqdm(loader, desc=options.split, mininterval=1.0, disable=not sys.stderr.isatty()))
    scores = score_split(results, options.protocol)
    if predictions.shared:
        print(f"note: {predictions.shared} rows share their folder with another row (layout {predictions.layout})")
    if predictions.others:
        print(f"note: {predictions.others} other folders in {options.pred} are of no row of {options.split}, not read")
    if missing:
        print(f"note: {len(missing)} rows were not predicted and count as empty masks: {scores['failed'][:20]}")
    if options.json is not None:
        facts = {"pred": str(options.pred), "data": str(options.data), "split": options.split, "rows": len(rows),
                 "protocols": options.protocol, "layout": predictions.layout, "kind": options.kind}  # fmt: skip
        write_json(options.json, {**facts, "missing": [row.row for row in missing], "scores": scores})
    return scores


def comparison(scores: dict[str, Any], split: str, protocols: Sequence[str], mini: bool = False) -> str:
    """The result under each protocol, below the published numbers of that split; on synthetic data there are none."""
    published: list[list[Cell]] = []
    note = "synthetic data, which compare with no published number" if mini else "no published number for this split"
    if "s4" in protocols and not mini:
        published = [[name, j, f, (j + f) / 2, None] for name, (j, f) in TABLE_6.items()]
        note = "published: the paper's Table 6"
    elif split in ("test_s", "test_u") and "official" in protocols and not mini:
        published = [[line.method, *line.scores[split], None] for line in TABLE_1]
        note = "published: the paper's Table 1"
    rows = [[f"--pred, {name}", *(scores[name].get(k) for k in ("J", "F", "J&F", "S"))] for name in protocols]
    table = format_table([split, "J", "F", "J&F", "S"], [*published, *rows])
    return f"{table}\n{scores['n']} rows; {note}; percent, S: lower is better"


if __name__ == "__main__":
    sys.exit(main())
