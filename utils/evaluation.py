"""One split evaluated by any number of processes, interrupted at any time, always with the same result to the bit.

Batches are fixed by the order of rows alone (never by the number of processes or by what is done already), since the
last bits of a prediction may depend on what shares its batch. Each process takes every n-th open batch, appends its
rows to its own part file and never waits for the others; the main process pools the parts in row order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import RunConfig
from utils import distributed
from utils.config import git_state
from utils.draw import jpeg, save_masks, save_probabilities, strip
from utils.errors import DataError
from utils.files import hash_files, write_bytes, write_json, write_jsonl
from utils.progress import Progress
from utils.results import PartWriter, drop_other_parts, encode_masks, read_parts
from utils.scoring import NULL_CLASS, Faithful, RowResult, mask_logits, score_row, score_split
from utils.types import Batch, Prediction, Sample

MASK_LOGIT = 0.0
"""Pixels above it are written as predicted (probability 0.5)."""


@dataclass(frozen=True)
class SplitTask:
    """What is to be evaluated, and where its files go."""

    folder: Path
    """Gets metrics.json, predictions.jsonl, pictures/, masks/ and probabilities/."""
    split: str
    rows: tuple[int, ...]
    """Metadata rows in file order; position i is sample i of the loader."""
    protocols: tuple[str, ...]
    batch_size: int
    facts: dict[str, Any] = field(default_factory=dict)
    """All that predictions depend on besides (checkpoint, probe, code), as plain values; goes into metrics.json."""
    pictures: frozenset[int] = frozenset()
    """Rows that get a picture."""
    save_masks: bool = False
    save_probabilities: bool = False

    @property
    def identity(self) -> str:
        """Names the result: equal tasks give equal files."""
        settings = {"split": self.split, "rows": self.rows, "batch_size": self.batch_size, "protocols": self.protocols}
        drawn = {"pictures": sorted(self.pictures), "save_masks": self.save_masks}
        drawn["save_probabilities"] = self.save_probabilities
        facts = json.dumps({**settings, **drawn, "facts": self.facts}, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    def batches(self) -> list[list[int]]:
        """Positions, batch by batch."""
        positions = range(len(self.rows))
        return [list(positions[i : i + self.batch_size]) for i in range(0, len(positions), self.batch_size)]


def evaluate_split(
    task: SplitTask,
    load: Callable[[list[int]], Iterable[Batch]],
    predict: Callable[[Batch], list[Prediction]],
    frames_of: Callable[[Sample], np.ndarray] | None = None,
    faithful: Faithful | None = None,
) -> dict[str, Any]:
    """Predict and score a split; all processes call it and all get the scores.

    Args:
        task: see SplitTask. If its result lies in the folder already, nothing is computed.
        load: positions -> their samples in batches of `task.batch_size`, in that order.
        predict: a batch -> one prediction per sample, in that order.
        frames_of: uint8 [T,H,W,3] RGB of a sample, for its picture.
        faithful: see `scoring.score_row`.

    Raises:
        DataError: the parts on disk do not hold every row once all processes are done.
    """
    finished = distributed.from_main(_finished(task) if distributed.is_main() else None, "reading results")
    if finished is not None:
        return finished
    parts = task.folder / f"parts-{task.identity}"
    if distributed.is_main():
        drop_other_parts(task.folder, task.identity)
    done = read_parts(parts)
    distributed.barrier("reading results")  # nobody appends before everybody has read
    todo = [batch for batch in task.batches() if any(task.rows[i] not in done for i in batch)]
    mine = [i for batch in todo[distributed.rank() :: distributed.world_size()] for i in batch]
    progress = Progress(task.split, len(mine), "rows", hidden=not distributed.is_main())
    with PartWriter(parts, distributed.rank()) as writer, progress:
        for batch in load(mine):
            pairs = zip(batch.samples, predict(batch), strict=True)
            records = [_finish_row(task, sample, prediction, frames_of, faithful) for sample, prediction in pairs]
            writer.append(records)
            progress.update(len(records))
    distributed.barrier(f"evaluation of {task.split}")
    return distributed.from_main(_merge(task, parts) if distributed.is_main() else {}, f"scores of {task.split}")


def evaluation_facts(config: RunConfig, stage: str, checkpoint: Path, table: Path | None = None) -> dict[str, Any]:
    """What predictions of a run depend on, for `SplitTask.facts`.

    Args:
        config: the evaluation, with the checkpoint's model and input settings.
        stage: that trained the checkpoint.
        checkpoint: folder with trained.json, which holds the SHA-256 of the tensors.
        table: that lists the rows, where it does not lie in `data.root` itself.
    """
    folders = [config.model.base, *([config.model.text_encoder] if config.model.text_encoder else [])]
    base = [path for folder in folders for path in Path(folder).iterdir() if path.is_file()]
    tables = [path for path in Path(config.data.root).iterdir() if path.is_file()]
    if table is not None and table not in tables:
        tables.append(table)
    sam = Path(config.model.sam_checkpoint)
    files = _described([*base, *([] if sam.is_dir() else [sam]), *tables])
    if sam.is_dir():  # its files have the names of the base's
        inside = _described(path for path in sam.iterdir() if path.is_file())
        files |= {f"{sam.name}/{name}": digest for name, digest in inside.items()}
    return {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hash_files([checkpoint / "trained.json"]),
        "stage": stage,
        "answers": "given" if stage == "teacher" else "generated",
        "probe": config.eval.probe,
        "files": files,
        "git": git_state(),
        "config": config.model_dump(
            mode="json",
            include={"seed", "model", "data", "eval", "engine"},
            exclude={"data": {"num_workers"}, "eval": {"output_dir"}},
        ),
    }


def _described(paths: Iterable[Path], hash_below: int = 1 << 26) -> dict[str, str]:
    """File name -> hash of its content, or its size where it has `hash_below` bytes or more (weights of a 7B model)."""
    sizes = {path: path.stat().st_size for path in sorted(paths)}
    return {p.name: hash_files([p])[:16] if size < hash_below else f"{size} bytes" for p, size in sizes.items()}


def spread(rows: Sequence[int], kinds: Sequence[str], count: int) -> frozenset[int]:
    """`count` of the rows (all, if fewer), taken in turn from each kind and evenly spread within it."""
    groups: dict[str, list[int]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        groups.setdefault(kind, []).append(row)
    shares = {kind: 0 for kind in groups}
    while sum(shares.values()) < min(count, len(rows)):
        for kind, members in groups.items():
            if shares[kind] < len(members) and sum(shares.values()) < count:
                shares[kind] += 1
    return frozenset(
        members[i] for kind, members in groups.items() for i in evenly(len(members), shares[kind])
    )


def evenly(size: int, count: int) -> list[int]:
    """`count` different positions below `size`, as evenly spread as whole numbers allow."""
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def _finished(task: SplitTask) -> dict[str, Any] | None:
    try:
        metrics = json.loads((task.folder / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(metrics, dict):
        return None
    complete = metrics.get("identity") == task.identity and (task.folder / "predictions.jsonl").is_file()
    return metrics["scores"] if complete else None


def _finish_row(
    task: SplitTask,
    sample: Sample,
    prediction: Prediction,
    frames_of: Callable[[Sample], np.ndarray] | None,
    faithful: Faithful | None,
) -> dict[str, Any]:
    """The row's line for the part file. Its picture and masks are written first, so that a finished row has them."""
    logits = mask_logits(prediction)
    masks = (logits > MASK_LOGIT).cpu().numpy()
    if frames_of is not None and sample.row in task.pictures:
        picture = jpeg(strip(frames_of(sample), sample.masks.cpu().numpy(), masks))
        write_bytes(task.folder / "pictures" / f"{sample.row:05d}.jpg", picture)
    if task.save_masks:
        save_masks(task.folder / "masks" / f"{sample.row:05d}", masks)
    if task.save_probabilities:
        probabilities = logits.detach().float().sigmoid().cpu().numpy()
        save_probabilities(task.folder / "probabilities" / f"{sample.row:05d}", probabilities)
    result = score_row(sample, prediction, task.protocols, faithful).to_json()
    return {**result, "video": sample.video_key, "audio": sample.audio_key, "masks": encode_masks(masks)}


def _merge(task: SplitTask, parts: Path) -> dict[str, Any]:
    """Pool the parts of all processes, write the two result files and remove the parts."""
    found = read_parts(parts)
    missing = sorted(set(task.rows) - found.keys())
    if missing or len(found) != len(task.rows):
        raise DataError(
            f"{parts}: {len(found)} rows instead of {len(task.rows)}, missing {missing[:5]}; parts of a process on "
            "another machine are not seen here. Remedy: use a folder that all processes share, and run again."
        )
    records = [found[row] for row in task.rows]
    results = [RowResult.from_json(record) for record in records]
    scores = score_split(results, task.protocols)
    write_jsonl(task.folder / "predictions.jsonl", map(_line, records, results))
    metrics = {
        "split": task.split,
        "identity": task.identity,
        "protocols": task.protocols,
        "rows": len(records),
        "mask_rule": "predictions.jsonl, pictures and masks hold pixels with probability > 0.5 at native size",
        **task.facts,
        "scores": scores,
    }
    write_json(task.folder / "metrics.json", metrics)
    shutil.rmtree(parts)
    return json.loads(json.dumps(scores))


def _line(record: dict[str, Any], result: RowResult) -> dict[str, Any]:
    """One line of predictions.jsonl: the row's own scores in percent (protocol per_expression)."""
    named = ("row", "uid", "split", "reference", "kind", "class_name")
    scores = result.row_scores
    own = {"S": 100 * scores.s} if result.class_name == NULL_CLASS else {"J": 100 * scores.j, "F": 100 * scores.f}
    return {
        **{name: record[name] for name in named},
        "reasoning": result.text,
        "answer_class": result.answer_class,
        "has_seg": result.has_seg,
        "well_formed": result.well_formed,
        "faithful": result.faithful,
        **own,
        "video": record["video"],
        "audio": record["audio"],
        "masks": record["masks"],
    }
