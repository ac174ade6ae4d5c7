"""Score the masks of any method, exactly as train_ds_test.py scores ours.

    python scripts/evaluate_masks.py --pred runs/other/masks --data data/refavs --split test_s --protocol official

--pred holds one folder per row, named by row number (00012), by uid, or as the ground truth (<clip>/fid_<fid>), with
one 8 or 16 bit grey PNG per frame (0.png or 00000.png): a mask of 0 and 255, or a probability as a share of the largest
value. Images have the clip's own size or, where the protocol compares at one size, that (official: 256x256).

Masks written by eval.save_masks are already cut at probability 0.5: their J under per_expression is that of the run to
the bit, their other scores are those of hard masks. Probabilities written by eval.save_probabilities keep 16 bits.

The published numbers of the paper's Table 1 (Table 6 for AVSBench S4) are printed beside the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the project's root must be on the path first
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

from configs.schema import DataConfig  # noqa: E402
from dataset.build import build_index  # noqa: E402
from dataset.collate import init_worker  # noqa: E402
from dataset.media import read_frames  # noqa: E402
from dataset.predictions import Kind, PredictionFolder, read_prediction  # noqa: E402
from dataset.refavs import Row  # noqa: E402
from dataset.truth import ClipIndex, read_truth  # noqa: E402
from utils.errors import DataError, run_command  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.metrics import PROTOCOLS  # noqa: E402
from utils.paper import TABLE_1, TABLE_6  # noqa: E402
from utils.scoring import EMPTY_LOGIT, RowResult, row_pieces, score_split  # noqa: E402
from utils.tables import Cell, format_table  # noqa: E402

BENCHMARK_OF = {"s4": "avsbench_s4", "ms3": "avsbench_ms3"}
"""Protocol -> its benchmark, where that is not Ref-AVS."""


@dataclass(frozen=True)
class Options:
    """What decides about the score of a row, besides its files."""

    protocols: tuple[str, ...]
    kind: Kind = "auto"
    num_frames: int | None = None
    max_pixels: int = 50_000_000


class ScoredRows(Dataset[RowResult]):
    """Row i of a split, read and reduced to what its scores need; a row without a folder is an empty mask."""

    def __init__(self, index: ClipIndex, predictions: PredictionFolder, options: Options) -> None:
        self.index, self.predictions, self.options = index, predictions, options

    def __len__(self) -> int:
        return len(self.predictions.rows)

    def __getitem__(self, i: int) -> RowResult:
        row = self.predictions.rows[i]
        try:
            return self._score(row)
        except (DataError, ValueError) as error:
            raise DataError(f"row {row.row} ({row.uid}): {error}") from error

    def _score(self, row: Row) -> RowResult:
        options = self.options
        frames = self.index.frames_folder(row.clip)
        size = tuple(read_frames(frames, 1, options.max_pixels).shape[1:3])
        truth, labelled = read_truth(self.index, row, size, options.num_frames, options.max_pixels)
        folder = self.predictions.folder(row)
        if folder.is_dir():
            logits = read_prediction(folder, len(truth), self._sizes(size), options.kind, options.max_pixels)
        else:
            logits = torch.full(truth.shape, EMPTY_LOGIT)
        chosen = list(range(len(truth)) if labelled is None else labelled)
        pieces = row_pieces(logits[chosen], torch.from_numpy(truth)[chosen], options.protocols)
        told = (row.row, row.uid, str(row.split), row.reference, row.kind, row.class_name)
        return RowResult(*told, text="", answer_class=None, has_seg=folder.is_dir(), faithful=None, pieces=pieces)

    def _sizes(self, native: tuple[int, int]) -> list[tuple[int, int]]:
        """The clip's size, and the protocols' own where all of them share one."""
        own = {PROTOCOLS[name].size for name in self.options.protocols}
        side = own.pop() if len(own) == 1 else None
        return [native] if side is None or native == (side, side) else [native, (side, side)]


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
    return run_command(lambda: print(comparison(evaluate(options), options.split, options.protocol)))


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the folder, in percent (see `scoring.score_split`); a warning for rows that were not predicted."""
    benchmarks = {BENCHMARK_OF.get(name, "refavs") for name in options.protocol if name != "per_expression"}
    if len(benchmarks) > 1:
        raise DataError(f"--protocol {' '.join(options.protocol)}: of two benchmarks. Remedy: name one.")
    index = build_index(DataConfig(benchmark=benchmarks.pop() if benchmarks else "refavs", root=options.data))
    rows = _rows(index, options.split)
    predictions = PredictionFolder(options.pred, rows)
    missing = predictions.missing
    if missing and options.missing == "error":
        raise DataError(
            f"{options.pred}: {len(missing)} of {len(rows)} rows have no folder, first row {missing[0].row}: "
            f"{predictions.folder(missing[0])}. Remedy: write them, or score them as empty masks (--missing empty)."
        )
    settings = Options(tuple(options.protocol), options.kind, options.num_frames)
    loader = DataLoader(
        ScoredRows(index, predictions, settings), batch_size=None, num_workers=options.workers,
        worker_init_fn=init_worker,
    )  # fmt: skip
    results = list(tqdm(loader, desc=options.split, mininterval=1.0, disable=not sys.stderr.isatty()))
    scores = score_split(results, settings.protocols)
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


def comparison(scores: dict[str, Any], split: str, protocols: Sequence[str]) -> str:
    """The result under each protocol, below the published numbers of that split."""
    rows: list[list[Cell]] = []
    if "s4" in protocols:
        rows = [[name, j, f, (j + f) / 2, None] for name, (j, f) in TABLE_6.items()]
    elif split in ("test_s", "test_u") and "official" in protocols:
        rows = [[line.method, *line.scores[split], None] for line in TABLE_1]
    rows += [[f"--pred, {name}", *(scores[name].get(k) for k in ("J", "F", "J&F", "S"))] for name in protocols]
    source = "Table 6" if "s4" in protocols else "Table 1"
    note = f"published: the paper's {source}" if len(rows) > len(protocols) else "no published number for this split"
    table = format_table([split, "J", "F", "J&F", "S"], rows)
    return f"{table}\n{scores['n']} rows; {note}; percent, S: lower is better"


def _rows(index: ClipIndex, split: str) -> list[Row]:
    try:
        return index.rows(split)
    except ValueError as error:
        raise DataError(f"--split {split}: {error}. Remedy: train, val, test_s, test_u or test_n.") from error


if __name__ == "__main__":
    sys.exit(main())
