"""Evaluation of a split: equal results at 1, 2 and 3 processes, after kills, and never from stale files."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.evaluation_cases import make_prediction, make_sample
from utils import distributed
from utils.errors import DataError
from utils.evaluation import SplitTask, evaluate_split, evenly, spread
from utils.results import decode_masks
from utils.types import Batch

ROWS = tuple(range(3, 27))
KINDS = ("visual", "audio", "spatial")


def right_class(text, truth, reference):
    return truth["says"] in text


class World:
    """Samples by position and a predictor whose last bits depend on what shares the batch, as a model's do."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.predicted, self.stop_after = [], stop_after

    def load(self, positions):
        for start in range(0, len(positions), 4):
            samples = [make_sample(ROWS[i], kind=KINDS[i % 3]) for i in positions[start : start + 4]]
            stacked = torch.zeros(len(samples))
            yield Batch(samples, stacked, stacked, stacked, [s.masks for s in samples])

    def predict(self, batch):
        if self.stop_after is not None and len(self.predicted) >= self.stop_after:
            raise KeyboardInterrupt
        rows = [sample.row for sample in batch.samples]
        self.predicted += rows
        shift = 1e-3 * sum(rows)
        made = [make_prediction(s, seed=s.row, has_seg=s.row % 7 != 0) for s in batch.samples]
        for prediction in made:
            prediction.mask_logits += shift
        return made


def task(folder, **changes):
    values = dict(folder=Path(folder), split="test_s", rows=ROWS, protocols=("official", "per_expression"),
                  batch_size=4, facts={"checkpoint": "aaa"}, pictures=frozenset({5, 9}), save_masks=True)
    return SplitTask(**{**values, **changes})


def run(folder, world=None, **changes):
    world = world or World()
    return evaluate_split(task(folder, **changes), world.load, world.predict, lambda s: s.frames, right_class)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), files(folder)


def test_files_of_a_split(whole, tmp_path):
    scores, written = whole
    names = {name.split("/")[0] for name in written}
    assert names == {"masks", "metrics.json", "pictures", "predictions.jsonl"}
    metrics = json.loads(written["metrics.json"])
    assert metrics["split"] == "test_s" and metrics["rows"] == 24 and metrics["checkpoint"] == "aaa"
    assert metrics["scores"] == scores and scores["failed"] == [7, 14, 21]
    lines = [json.loads(line) for line in written["predictions.jsonl"].decode().splitlines()]
    assert [line["row"] for line in lines] == list(ROWS)
    assert np.mean([line["J"] for line in lines]) == pytest.approx(scores["per_expression"]["J"])
    assert "pieces" not in lines[0]
    stored = decode_masks(lines[2]["masks"])
    image = cv2.imdecode(np.frombuffer(written["masks/00005/00001.png"], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.array_equal(stored[1], image == 255)
    assert not decode_masks(lines[4]["masks"]).any()  # row 7 failed
    assert [name for name in written if name.startswith("pictures")] == ["pictures/00005.jpg", "pictures/00009.jpg"]


@pytest.mark.parametrize("processes", [2, 3])
def test_equal_to_the_bit_at_any_number_of_processes(processes, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_evaluation"])  # torch is imported once, not once per process
    port = free_port()
    running = [context.Process(target=one_process, args=(tmp_path, rank, processes, port)) for rank in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(240)
    assert [process.exitcode for process in running] == [0] * processes
    assert files(tmp_path) == whole[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_process(folder, rank, processes, port):
    """What each process of the test above runs."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.start(threads=1)
    world = World()
    scores = run(folder, world)
    assert 0 < len(world.predicted) < len(ROWS) and scores["n"] == len(ROWS)
    distributed.stop()


@pytest.mark.parametrize("stop_after", [4, 12])
def test_a_kill_costs_no_finished_batch_and_changes_nothing(stop_after, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, World(stop_after))
    part = next(tmp_path.glob("parts-*/rank0.jsonl"))
    part.write_bytes(part.read_bytes() + b'{"row": 26, "ui')
    again = World()
    assert run(tmp_path, again) == whole[0]
    assert again.predicted == list(ROWS[stop_after:])
    assert files(tmp_path) == whole[1]


def test_a_batch_of_which_a_row_is_missing_is_repeated_whole(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, World(8))
    part = next(tmp_path.glob("parts-*/rank0.jsonl"))
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:6]))
    again = World()
    run(tmp_path, again)
    assert again.predicted == list(ROWS[4:])
    assert files(tmp_path) == whole[1]


def test_a_finished_split_is_not_computed_again(tmp_path):
    first = run(tmp_path)
    again = World()
    assert run(tmp_path, again) == first and again.predicted == []


@pytest.mark.parametrize("change", [{"facts": {"checkpoint": "bbb"}}, {"rows": ROWS[:-1]}, {"batch_size": 3}])
def test_nothing_stale_is_used(change, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, World(8))
    again = World()
    if "batch_size" in change:
        threes = lambda positions: [positions[i : i + 3] for i in range(0, len(positions), 3)]  # noqa: E731
        again.load = lambda positions: (batch for part in threes(positions) for batch in World().load(part))
    run(tmp_path, again, **change)
    assert len(again.predicted) == len(change.get("rows", ROWS))
    assert not list(tmp_path.glob("parts-*"))


def test_rows_that_got_lost_are_an_error(tmp_path):
    world = World()
    world.load = lambda positions: World().load(positions[:-1])
    with pytest.raises(DataError, match=r"23 rows instead of 24, missing \[26\]"):
        run(tmp_path, world)


@pytest.mark.parametrize("count", [0, 1, 5, 7, 20])
def test_pictures_are_spread_over_kinds_and_rows(count):
    rows, kinds = list(range(100, 110)), ["a"] * 7 + ["b"] * 3
    chosen = spread(rows, kinds, count)
    assert len(chosen) == min(count, 10) and chosen <= set(rows)
    shares = sorted(sum(kinds[row - 100] == kind for row in chosen) for kind in "ab")
    assert shares[1] - shares[0] <= 1 or shares[0] == 3
    assert evenly(10, 5) == [1, 3, 5, 7, 9] and evenly(3, 3) == [0, 1, 2]
