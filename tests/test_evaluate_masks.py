"""scripts/evaluate_masks.py: any method's folder scores as train_ds_test.py's evaluation does; faults are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dataset.media import read_truth
from dataset.predictions import PredictionFolder, read_prediction
from dataset.refavs import RefAvsIndex
from scripts import evaluate_masks
from tests.avsbench_cases import write_v1
from tests.data_builders import write_world
from tests.evaluation_cases import make_sample
from utils.errors import DataError
from utils.evaluation import SplitTask, evaluate_split
from utils.scoring import EMPTY_LOGIT
from utils.types import Batch, Prediction

ROWS = (
    *[(f"c{i}_0_10000", f"c{i}_0_10000_{k}_1", "test_s", 0, "The thing") for i in range(3) for k in ("dog", "cat")],
    *[("c0_0_10000", f"null_m-c0_0_10000_null_{k}", "test_n", 0, "The sounding object") for k in (1, 2)],
)
PROTOCOLS = ("official", "per_expression")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), ROWS, frames=4, seconds=0.1)


def run(world: Path, folder: Path, split: str, hard: bool) -> dict:
    """The evaluation of train_ds_test.py over made-up logits, with its masks and probabilities written."""
    index = RefAvsIndex(world)
    samples = []
    for row in index.rows(split):
        truth, _ = read_truth(index, row, (48, 64))
        samples.append(make_sample(row.row, class_name=row.class_name, uid=row.uid, split=split,
                                   masks=torch.from_numpy(truth)))

    def load(positions: list[int]):
        stacked = torch.zeros(len(positions))
        chosen = [samples[i] for i in positions]
        yield Batch(chosen, stacked, stacked, stacked, [s.masks for s in chosen])

    def predict(batch: Batch) -> list[Prediction]:
        return [Prediction(s.row, "It is [SEG].", None, logits_of(s, hard), True) for s in batch.samples]

    task = SplitTask(folder / split, split, tuple(s.row for s in samples), PROTOCOLS, 100, save_masks=True,
                     save_probabilities=True)
    return evaluate_split(task, load, predict)


def logits_of(sample, hard: bool) -> torch.Tensor:
    noise = torch.randn(sample.masks.shape, generator=torch.Generator().manual_seed(sample.row))
    logits = torch.where(sample.masks.roll(3, -1), 2.0, -3.0) + noise
    return torch.where(logits > 0, -EMPTY_LOGIT, EMPTY_LOGIT) if hard else logits


def score(pred: Path, world: Path, tmp_path: Path, *options: str, split: str = "test_s") -> dict:
    out = tmp_path / "scores.json"
    arguments = ["--pred", str(pred), "--data", str(world), "--split", split, "--json", str(out), *options]
    assert evaluate_masks.main(["--protocol", *PROTOCOLS, *arguments]) == 0
    return json.loads(out.read_text())["scores"]


@pytest.mark.parametrize("split", ["test_s", "test_n"])
def test_exported_masks_score_as_the_run_did_to_the_bit(world: Path, tmp_path: Path, split: str) -> None:
    """A run whose masks are hard: nothing is lost in the files, so every score is equal to the bit."""
    ran = run(world, tmp_path, split, hard=True)
    scored = score(tmp_path / split / "masks", world, tmp_path, split=split)
    for protocol in PROTOCOLS:
        assert scored[protocol] == ran[protocol] and scored["classes"].keys() == ran["classes"].keys()
    assert ("S" if split == "test_n" else "J") in scored["official"]


def test_soft_masks_lose_their_rounding_alone(world: Path, tmp_path: Path) -> None:
    """16-bit probabilities: 1e-3 of a point. Masks cut at 0.5: J per expression to the bit, other scores move."""
    ran = run(world, tmp_path, "test_s", hard=False)
    soft = score(tmp_path / "test_s/probabilities", world, tmp_path)
    for protocol in PROTOCOLS:
        for name in ("J", "F"):
            assert soft[protocol][name] == pytest.approx(ran[protocol][name], abs=1e-3)
    assert soft["per_expression"]["J"] == ran["per_expression"]["J"]
    hard = score(tmp_path / "test_s/masks", world, tmp_path)
    assert hard["per_expression"]["J"] == ran["per_expression"]["J"]
    assert hard["per_expression"]["F"] != ran["per_expression"]["F"]


def test_every_layout_and_number_of_processes_gives_one_score(world: Path, tmp_path: Path, capsys) -> None:
    run(world, tmp_path, "test_s", hard=False)
    by_row = tmp_path / "test_s/masks"
    rows = RefAvsIndex(world).rows("test_s")
    for row in rows:
        shutil.copytree(by_row / f"{row.row:05d}", tmp_path / "uid" / row.uid)
    wanted = score(by_row, world, tmp_path)
    (by_row / "99999").mkdir()  # of another split, say
    capsys.readouterr()
    assert score(by_row, world, tmp_path) == wanted and "note: 1 other folders" in capsys.readouterr().out
    assert score(tmp_path / "uid", world, tmp_path, "--workers", "1") == wanted
    for row in rows[::2]:
        shutil.copytree(by_row / f"{row.row:05d}", tmp_path / "object" / row.clip / f"fid_{row.fid}")
    capsys.readouterr()
    score(tmp_path / "object", world, tmp_path)
    printed = capsys.readouterr().out
    assert "6 rows share their folder" in printed
    assert "AURORA (paper)" in printed and "63.20" in printed and "--pred, official" in printed and "6 rows" in printed
    try:
        (world / "mini_s4.json").touch()  # a file of synthetic data, which stand beside no published number
        score(tmp_path / "object", world, tmp_path)
    finally:
        (world / "mini_s4.json").unlink()
    printed = capsys.readouterr().out
    assert "AURORA" not in printed and "synthetic" in printed and "--pred, official" in printed


def test_rows_that_were_not_predicted(world: Path, tmp_path: Path, capsys) -> None:
    run(world, tmp_path, "test_s", hard=True)
    pred = tmp_path / "test_s/masks"
    shutil.rmtree(pred / "00002")
    arguments = ["--pred", str(pred), "--data", str(world)]
    assert evaluate_masks.main(arguments) == 1
    assert "1 of 6 rows have no folder, first row 2" in capsys.readouterr().err
    scored = score(pred, world, tmp_path, "--missing", "empty")
    assert scored["failed"] == [2] and scored["n"] == 6


def write(folder: Path, image: np.ndarray, number: int = 0) -> None:
    cv2.imwrite(str(folder / f"{number:05d}.png"), image)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "00003.png").unlink(), r"row 0 .*3 images for a clip of 4 frames"),
        (lambda f: (f / "00001.png").unlink(), r"image 1 is missing"),
        (lambda f: write(f, np.zeros((50, 64), np.uint8)), r"64x50 pixels; the protocol takes 64x48 or 256x256"),
        (lambda f: write(f, np.zeros((256, 256), np.uint8)), r"00001.png: 64x48 pixels"),
        (lambda f: write(f, np.zeros((48, 64), np.uint16)), r"00001.png: uint8, 00000.png is uint16"),
        (lambda f: write(f, np.zeros((9000, 9000), np.uint8)), r"9000x9000 pixels, limit"),
        (lambda f: (f / "00000.png").write_bytes(b"not a picture"), r"00000.png: not a JPEG or PNG"),
        (lambda f: [write(f, np.eye(48, 64, dtype=np.uint8), t) for t in range(4)], r"values \[1\]; a mask holds"),
        (lambda f: [write(f, 38 * np.eye(48, 64, dtype=np.uint8), t) for t in range(4)], r"values \[38\]; a mask "),
        (lambda f: [write(f, 255 * np.eye(48, 64, dtype=np.uint16), t) for t in range(4)], r"values \[255\]; .* 65535"),
        (lambda f: write(f, np.zeros((48, 64), np.uint8), 4), r"5 images for a clip of 4"),
    ],
)
def test_wrong_files_are_named(world: Path, tmp_path: Path, damage, message: str, capsys) -> None:
    run(world, tmp_path, "test_s", hard=True)
    damage(tmp_path / "test_s/masks/00000")
    assert evaluate_masks.main(["--pred", str(tmp_path / "test_s/masks"), "--data", str(world)]) == 1
    printed = capsys.readouterr().err
    with pytest.raises(DataError, match=message):
        raise DataError(printed)
    assert "Remedy" in printed


def test_wrong_folders_and_arguments_are_named(world: Path, tmp_path: Path, capsys) -> None:
    rows = RefAvsIndex(world).rows("test_s")
    with pytest.raises(DataError, match="no such folder"):
        PredictionFolder(tmp_path / "nowhere", rows)
    with pytest.raises(DataError, match=r"no row of this split \(looked for 00000, c0_0_10000_dog_1, c0_0_10000/fid_0"):
        PredictionFolder(tmp_path, rows)
    assert evaluate_masks.main(["--pred", str(tmp_path), "--data", str(world), "--split", "all"]) == 1
    assert "--split all" in capsys.readouterr().err
    both = ["--pred", str(tmp_path), "--data", str(world), "--protocol", "official", "s4"]
    assert evaluate_masks.main(both) == 1 and "of two benchmarks" in capsys.readouterr().err


def test_values_become_logits(tmp_path: Path) -> None:
    write(tmp_path, np.array([[0, 255], [255, 0]], np.uint8))
    assert read_prediction(tmp_path, 1, [(2, 2)]).tolist() == [[[-1e4, 1e4], [1e4, -1e4]]]
    soft = read_prediction(tmp_path, 1, [(2, 2)], "probabilities")
    low, high = 0.5 / 255, 1 - 0.5 / 255
    assert torch.sigmoid(soft).flatten().tolist() == pytest.approx([low, high, high, low])
    write(tmp_path, np.array([[0, 128], [255, 51]], np.uint8))
    with pytest.raises(DataError, match=r"values \[51, 128\]; a mask holds"):
        read_prediction(tmp_path, 1, [(2, 2)], "masks")
    soft = torch.sigmoid(read_prediction(tmp_path, 1, [(2, 2)]))
    assert soft[0, 0, 1] == pytest.approx(128 / 255) and soft[0, 1, 1] == pytest.approx(0.2)
    write(tmp_path, np.array([[0, 32768], [65535, 1]], np.uint16))
    soft = torch.sigmoid(read_prediction(tmp_path, 1, [(2, 2)]))
    assert soft[0, 0, 1] == pytest.approx(32768 / 65535) and soft[0, 0, 1] > 0.5


def test_avsbench_folder(tmp_path: Path, capsys) -> None:
    """Clips are named by their own name; the true masks score 100 beside the paper's Table 6."""
    write_v1(tmp_path, size=(224, 224))
    truth = tmp_path / "Single-source/s4_data/gt_masks/test"
    for source in truth.glob("*/*"):
        target = tmp_path / "pred" / source.name
        target.mkdir(parents=True)
        for t in range(5):
            shutil.copy(source / f"{source.name}_{t + 1}.png", target / f"{t}.png")
    arguments = ["--pred", str(tmp_path / "pred"), "--data", str(tmp_path), "--split", "test", "--protocol", "s4"]
    assert evaluate_masks.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "CRAB" in printed and "77.30" in printed and "Table 6" in printed
    line = next(line for line in printed.splitlines() if line.startswith("--pred"))
    assert float(line.split()[2]) == 100.0
    (tmp_path / "mini_s4.json").touch()
    assert evaluate_masks.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "CRAB" not in printed and "synthetic" in printed
    assert line.split() in [found.split() for found in printed.splitlines()]
