"""AVSBench S4 and MS3 from miniature copies of both released layouts to samples, losses and scores."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_ds_test
from configs.schema import DataConfig
from dataset.avsbench import CATEGORY_OBJECTS, AvsBenchIndex
from dataset.clips import ClipDataset, ClipSettings
from dataset.loader import build_index, build_loader, build_processor, training_clips
from dataset.processor import AuroraProcessor
from dataset.prompt import Prompts, load_tokenizer
from dataset.refavs import RefAvsIndex
from model.aurora.build import build_model
from model.aurora.trained import save_trained
from model.stages import build_stage
from model.stages.base import draw_frames
from model.stages.grpo import judge
from tests.aurora_cases import SEG, tiny_batch, tiny_model, tiny_sample
from tests.avsbench_cases import FRAMES, MS3, S4, write_v1, write_v2
from tests.data_builders import write_tokenizer, write_world
from tests.evaluation_cases import make_prediction, make_sample
from tests.tiny_run import environment, make_tiny_run, write_config
from utils.config import load_config, save_config
from utils.errors import ConfigError, DataError
from utils.scoring import score_row, score_split
from utils.types import Generation

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=["v1", "v2"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write_v1(folder) if request.param == "v1" else write_v2(folder)


def dataset(root: Path, subset: str, split: str, tokenizer: Path, **settings: object) -> ClipDataset:
    index = AvsBenchIndex(root, subset)
    processor = AuroraProcessor(None, 28, 32, 16, None)
    prompts = Prompts(*load_tokenizer(tokenizer), "none")
    return ClipDataset(index, index.rows(split), processor, prompts, settings=ClipSettings(**settings))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_rows_of_both_layouts(root: Path) -> None:
    s4, ms3 = AvsBenchIndex(root, "s4"), AvsBenchIndex(root, "ms3")
    assert [len(s4.rows(split)) for split in ("train", "val", "test")] == [2, 1, 2]
    assert [len(ms3.rows(split)) for split in ("train", "val", "test")] == [1, 0, 1]
    row = s4.rows("test")[0]
    assert row.reference == "The sounding object" and row.class_name == "dog" and row.row == 2
    assert row.uid == row.clip == ("-fgh" if s4.layout == "v1" else "-fgh_0_5000")
    assert ms3.rows("test")[0].class_name == "" and not ms3.rows("test")[0].is_null
    assert ms3.clips("train") == [MS3[0][0] + ("" if ms3.layout == "v1" else "_0_5000")]
    assert build_index(DataConfig(benchmark="avsbench_ms3", root=str(root))).table == ms3.table


def test_samples_of_both_layouts(root: Path, tokenizer: Path) -> None:
    for split, labelled in (("train", (0,)), ("test", None)):
        sample = dataset(root, "s4", split, tokenizer, answer="plain")[0]
        assert sample.masks.shape[0] == len(sample.sam_pixels) == FRAMES and sample.labelled == labelled
        assert sample.masks.flatten(1).any(1).tolist() == [t == 0 or split == "test" for t in range(FRAMES)]
        assert sample.fbank.shape[0] == 998  # ten one-second windows, overlapping in five seconds of sound
    sample = dataset(root, "ms3", "train", tokenizer)[0]
    empty = [] if AvsBenchIndex(root, "ms3").layout == "v2" else [2]
    assert sample.labelled is None
    assert [t for t in range(FRAMES) if not sample.masks[t].any()] == empty


def test_frames_in_numeric_order_from_the_first_number(tmp_path: Path, tokenizer: Path) -> None:
    """The object moves one pixel a frame: its left edge tells the number of the mask."""
    clips = dataset(write_v1(tmp_path), "s4", "test", tokenizer)
    assert [int(mask.any(0).nonzero()[0]) for mask in clips[0].masks] == [0, 1, 2, 3, 4]


def test_num_frames_must_leave_an_annotated_frame(root: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"none of the frames read has a mask.*num_frames"):
        dataset(root, "s4", "train", tokenizer, num_frames=1)[0]


def test_all_categories_of_s4_are_known() -> None:
    assert len(CATEGORY_OBJECTS) == 23 and {line[2] for line in S4} <= CATEGORY_OBJECTS.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dog_barking", "dog_sleeping", r"row 1 .*category = 'dog_sleeping': is none of the 23"),
        ("cd_e", "_a-b", r"row 1: _a-b is named twice"),
        ("cd_e", "../cd_e", r"clip = '../cd_e': is not the name of one folder"),
        ("train", "training", r"split = 'training': a split is one of train, val, test"),
        ("category", "kind", r"without \['category'\]"),
    ],
)
def test_faulty_tables_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    table = write_v1(tmp_path) / "Single-source/s4_meta_data.csv"
    table.write_text(table.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        AvsBenchIndex(tmp_path, "s4")


def test_missing_files_are_named(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"none of Single-source/s4_meta_data.csv.*Remedy: set data.root"):
        AvsBenchIndex(tmp_path, "s4")
    write_v1(tmp_path)
    (tmp_path / "Single-source/s4_data/gt_masks/test/dog_barking/-fgh/-fgh_4.png").unlink()
    with pytest.raises(DataError, match=r"sample -fgh \(row 2\): .*image 4 is missing"):
        dataset(tmp_path, "s4", "test", tokenizer)[0]
    with pytest.raises(DataError, match="split = 'test_s': AVSBench has"):
        AvsBenchIndex(tmp_path, "s4").rows("test_s")


def test_only_annotated_frames_are_trained_rewarded_and_scored() -> None:
    batch = tiny_batch(replace(tiny_sample(0), labelled=(1,)), tiny_sample(1))
    assert draw_frames(batch, None, torch.device("cpu"))[0].tolist() == [1]
    model = tiny_model()
    width = model.backbone.language_model.config.hidden_size
    hidden = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    whole_answers = torch.zeros(2, dtype=torch.bool)
    answers = Generation([torch.tensor([SEG])] * 2, ["[SEG]"] * 2, hidden, torch.arange(2), whole_answers)
    ious = []
    for frame in (1, 0, 1):  # the second time an unannotated frame has been changed, the third time an annotated one
        with torch.no_grad():
            ious.append(judge(model, batch, model.encode(batch), answers, 1)[0][0].iou)
        batch.masks[0] = batch.masks[0].clone()
        batch.masks[0][1 - frame] = ~batch.masks[0][1 - frame]
    assert ious[0] == ious[1] != ious[2]
    whole = replace(make_sample(1), class_name="")
    prediction = make_prediction(whole)
    first = replace(whole, labelled=(0,))
    alone = replace(whole, masks=whole.masks[:1])
    alone_prediction = make_prediction(alone, logits=prediction.mask_logits[:1])
    scores = [score_split([score_row(s, p, ("s4",))], ("s4", "per_expression"))
              for s, p in ((first, prediction), (alone, alone_prediction))]
    assert scores[0] == scores[1] and scores[0]["class_accuracy"] is None and scores[0]["classes"] == {}


def test_refavs_keeps_every_frame(tmp_path: Path) -> None:
    index = build_index(DataConfig(root=str(write_world(tmp_path, seconds=1.0))))
    assert isinstance(index, RefAvsIndex) and index.table.name == "metadata.csv"


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        ("eval_s4.yaml", ["eval.splits=[test_s]"], "the benchmark has no such split"),
        ("eval_s4.yaml", ["eval.protocol=[ms3]"], "another benchmark's protocol"),
        ("eval.yaml", ["eval.splits=[test]"], "the benchmark has no such split"),
        ("eval.yaml", ["eval.protocol=[s4]"], "another benchmark's protocol"),
        ("sft.yaml", ["data.benchmark=avsbench_s4"], "AVSBench has no reasoning records"),
        ("reflective.yaml", ["data.benchmark=avsbench_s4"], "AVSBench has no reflective paths"),
        ("grpo.yaml", ["data.benchmark=avsbench_ms3"], "MS3 does not name what sounds"),
    ],
)
def test_impossible_benchmark_settings_are_refused(file: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / file, overrides)


def test_the_fine_tuning_of_table_6() -> None:
    config = load_config(ROOT / "configs/s4.yaml")
    clips_per_step = 2 * config.engine.micro_batch * config.engine.accumulation
    assert 3 * 3452 <= config.optim.steps * clips_per_step < 3 * 3452 + clips_per_step
    assert config.init_from == "runs/grpo/final" and config.data.cot == () and config.reflective.paths == ()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model, untrained, and both layouts below `data`."""
    folder = tmp_path_factory.mktemp("tiny")
    path = make_tiny_run(folder, data={"answer": "plain", "num_frames": None}, stage="teacher")
    config = load_config(path)
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    save_trained(build_model(config, len(tokenizer), seg_id), folder / "start")
    save_config(config, folder / "start")
    write_v1(folder / "v1")
    write_v2(folder / "v2")
    return folder


def test_training_on_s4_reads_the_annotated_frame_alone(tiny: Path) -> None:
    config = load_config(tiny / "run.yaml", ["data.benchmark=avsbench_s4", f"data.root={tiny / 'v1'}"])
    tokenizer, seg_id = load_tokenizer(config.model.base)
    model = build_model(config, len(tokenizer), seg_id)
    processor = build_processor(config, tokenizer, model.backbone.media_format)
    clips = training_clips(config, processor, Prompts(tokenizer, seg_id, "none"))
    stage = build_stage(config, model, tokenizer)
    prepared = stage.prepare(next(iter(build_loader(clips, [0, 1], 2, 0, 0))))
    assert prepared.frame_index.tolist() == [[0], [0]]
    loss = stage.loss(prepared)
    loss.total.backward()
    assert float(loss.parts["mask_loss"]) > 0


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_evaluation_under_avsbench_conventions(tiny: Path, tmp_path: Path, layout: str, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", environment())
    values = {"checkpoint": str(tiny / "start"), "splits": ["test", "val"], "protocol": ["s4"], "batch_size": 2,
              "output_dir": str(tmp_path)}
    data = {"benchmark": "avsbench_s4", "root": str(tiny / layout), "num_workers": 0}
    settings = {"stage": "eval", "data": data, "engine": {"precision": "fp32", "threads": 1}, "eval": values}
    assert train_ds_test.main(["--config", str(write_config(tmp_path / "e.yaml", settings, {}))]) == 0
    found = json.loads((tmp_path / "test/metrics.json").read_text())
    assert found["rows"] == 2 and set(found["scores"]["s4"]) == {"J", "F", "J&F", "n"}
    assert ("s4_meta_data.csv" if layout == "v1" else "metadata.csv") in found["files"]
    assert found["scores"]["s4"]["F"] > 0
