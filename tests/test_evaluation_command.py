"""train_ds_test.py from checkpoint to files: both kinds of checkpoint, probes, processes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

import train_ds_test
from dataset.prompt import load_tokenizer
from model.aurora.build import build_model
from model.aurora.trained import save_trained
from tests.data_builders import write_world
from tests.tiny_run import ROOT, command, environment, make_tiny_run, write_config
from utils.config import load_config, save_config

ROWS = (
    *[(f"seen{i}_0_10000", f"seen{i}_0_10000_dog_{k}", "test_s", 0, f"The dog {k}") for i in range(3) for k in (1, 2)],
    *[("seen0_0_10000", f"null_m-seen0_0_10000_null_{k}", "test_n", 0, "The sounding object") for k in (1, 2, 3, 4)],
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Untrained checkpoints of stages teacher and sft, made through the public functions, and the data."""
    folder = tmp_path_factory.mktemp("tiny")
    path = make_tiny_run(folder)
    write_world(folder / "eval_data", ROWS, seconds=10.0)
    for stage in ("teacher", "sft"):
        changes = ("loss.distill=0", "sft.student_start=init_from", "sft.freeze_mask_decoder=false",
                   f"output_dir={folder / stage}")  # fmt: skip
        config = load_config(path, [f"stage={stage}", *changes])
        tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
        save_trained(build_model(config, len(tokenizer), seg_id), folder / stage / "final")
        save_config(config, folder / stage / "final")
    values = {"checkpoint": str(folder / "teacher"), "splits": ["test_s", "test_n"], "batch_size": 2,
              "max_new_tokens": 5, "pictures": 2, "output_dir": str(folder / "out")}
    settings = {"stage": "eval", "data": {"root": str(folder / "eval_data"), "num_workers": 0},
                "engine": {"precision": "fp32", "threads": 1}, "eval": values}
    write_config(folder / "eval.yaml", settings, {})
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """The process group's variables are set in a copy."""
    monkeypatch.setattr(os, "environ", environment())


def evaluate(folder, out, *overrides):
    arguments = ["--config", str(folder / "eval.yaml"), f"eval.output_dir={out}", *overrides]
    assert train_ds_test.main(arguments) == 0
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/metrics.json")}


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_teacher_reads_the_true_class(tiny, tmp_path, capsys):
    found = evaluate(tiny, tmp_path)
    scores = found["test_s"]["scores"]
    assert scores["n"] == 6 and scores["failed"] == []
    # The teacher's "It is {class} [SEG]." names the class and is not the ending that the paper's format asks for.
    assert scores["class_accuracy"] == 100 and scores["format_share"] == 0 and scores["faithful"] is None
    assert set(scores["official"]) == {"J", "F", "J&F", "n"}
    assert set(found["test_n"]["scores"]["official"]) == {"S", "n"}
    assert found["test_s"]["stage"] == "teacher" and found["test_s"]["probe"] == "none"
    assert found["test_s"]["config"]["model"]["base"] == str(tiny / "base")  # from the checkpoint's own config
    lines = [json.loads(line) for line in (tmp_path / "test_s/predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(6))
    assert lines[0]["reasoning"] == "It is dog [SEG]." and len(lines[0]["masks"]) == 2
    assert lines[0]["masks"][0]["size"] == [48, 64]
    assert len(list((tmp_path / "test_s/pictures").iterdir())) == 2
    printed = capsys.readouterr().out
    assert "test_s" in printed and "J&F off" in printed and "probe none" in printed


def test_a_student_generates_and_its_failures_are_listed(tiny, tmp_path):
    found = evaluate(tiny, tmp_path, f"eval.checkpoint={tiny / 'sft' / 'final'}", "eval.max_new_tokens=1")
    scores = found["test_s"]["scores"]
    assert scores["failed"] == list(range(6)) and scores["n"] == 6 and scores["official"]["J"] == 0
    assert found["test_n"]["scores"]["official"]["S"] == 0


def test_two_processes_write_the_same_files(tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(tiny, one, "eval.save_masks=true")
    arguments = command(tiny / "eval.yaml", f"eval.output_dir={two}", "eval.save_masks=true", processes=2)
    arguments[arguments.index(str(ROOT / "train_ds.py"))] = str(ROOT / "train_ds_test.py")
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert files(two) == files(one)


def test_a_probe_changes_the_result_and_is_named(tiny, tmp_path):
    plain = evaluate(tiny, tmp_path / "plain", "eval.splits=[test_s]")["test_s"]
    probed = evaluate(tiny, tmp_path / "probe", "eval.splits=[test_s]", "eval.probe=shuffle_video")["test_s"]
    assert probed["probe"] == "shuffle_video" and probed["scores"]["official"] != plain["scores"]["official"]
    line = json.loads((tmp_path / "probe/test_s/predictions.jsonl").read_text().splitlines()[0])
    assert line["video"] != "seen0_0_10000" and line["audio"] == "seen0_0_10000"


def test_a_limit_spreads_rows(tiny, tmp_path):
    evaluate(tiny, tmp_path, "eval.splits=[test_s]", "eval.limit=3")
    lines = (tmp_path / "test_s/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [1, 3, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.checkpoint=nowhere"], "eval.checkpoint = 'nowhere'"),
        (["stage=teacher", "data.answer=plain"], "stage = 'teacher'"),
        (["eval.probes=none"], "unknown key"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(tiny, overrides, message, capsys):
    with pytest.raises(SystemExit, match="1"):
        train_ds_test.main(["--config", str(tiny / "eval.yaml"), *overrides])
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "sft", tmp_path / "sft")
    weights = tmp_path / "sft/final/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    arguments = ["--config", str(tiny / "eval.yaml"), f"eval.checkpoint={tmp_path / 'sft'}"]
    assert train_ds_test.main(arguments) == 1
    assert "SHA-256 differs" in capsys.readouterr().err
