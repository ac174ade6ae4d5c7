"""Reports of runs that hold more than Ref-AVS: what mining evaluated, AVSBench, probes of several stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from dataset.mini.s4 import make_mini_s4
from scripts.report import main as report_command
from tests.report_case import (
    gallery,
    group,
    line,
    make_world,
    report,
    section,
    write_evaluation,
    write_run,
)
from utils.errors import DataError
from utils.report.breakdown import compare
from utils.report.runs import find_evaluations, pairs, run_summary, stage_summary, summary_table
from utils.results import encode_masks
from utils.tables import signed


def write_s4(folder: Path, root: Path, benchmark: str = "avsbench_s4", **facts: Any) -> Path:
    """An evaluation of the mini S4's test split; in the form of MS3 no row has a class."""
    own, named = benchmark.removeprefix("avsbench_"), benchmark == "avsbench_s4"
    lines = []
    for number, clip in ((2, "mini_test0000_0_5000"), (3, "mini_test0001_0_5000")):
        masks = np.zeros((5, 96, 96), bool)
        masks[:, :20, :20] = True
        changes = {"row": number, "uid": clip, "split": "test", "kind": "", "video": clip, "audio": clip}
        lines.append({**line(0), **changes, "reference": "The sounding object", "masks": encode_masks(masks),
                      "faithful": None, "class_name": "dog" if named else ""})
    inner = {"J": 41.0, "F": 51.0, "J&F": 46.0, "n": 2}
    scores = {**group(2), own: inner, "per_expression": {**inner, "J": 42.0}, "faithful": None, "faithful_n": 0}
    scores["class_accuracy"] = 50.0 if named else None
    metrics = {
        "split": "test", "identity": "s4", "protocols": [own, "per_expression"], "rows": 2, "checkpoint_sha256": "s",
        "stage": "grpo", "answers": "generated", "probe": "none", "files": {"mini_s4.json": "x"}, "git": "abc",
        "config": {"data": {"root": str(root), "answer": "reasoning", "num_frames": None, "benchmark": benchmark}},
        "scores": {**scores, "failed": [], "kinds": {}, "classes": {}}, **facts,
    }  # fmt: skip
    del metrics["scores"]["official"]
    (folder / "test").mkdir(parents=True)
    (folder / "test/metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (folder / "test/predictions.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_mined(folder: Path) -> Path:
    """What scripts/mine_failures.py leaves: the training split, scored per expression alone."""
    write_evaluation(folder, folder)
    for split in ("test_u", "test_n"):
        shutil.rmtree(folder / split)
    (folder / "test_s").rename(folder / "train")
    path = folder / "train/metrics.json"
    metrics = json.loads(path.read_text())
    metrics |= {"split": "train", "protocols": ["per_expression"]}
    for scores in (metrics["scores"], *metrics["scores"]["kinds"].values()):
        del scores["official"]
    path.write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    make_mini_s4(folder / "s4", {"train": 1, "val": 1, "test": 2})
    write_run(folder / "run", make_world(folder / "data"))
    write_s4(folder / "run/eval_s4", folder / "s4")
    write_mined(folder / "run/mine/failures.jsonl.eval")
    return folder / "run"


def test_mining_is_no_evaluation_unless_it_is_named(run: Path) -> None:
    assert [e.name for e in find_evaluations(run)] == ["teacher", "sft", "sft_zero", "s4"]
    mined = find_evaluations(run / "mine/failures.jsonl.eval")
    assert [(e.name, list(e.metrics)) for e in mined] == [("failures.jsonl.eval", ["train"])]
    found = stage_summary(mined[0].folder)
    assert found["protocol"] == "per_expression" and found["train"]["per_expression"]["J"] == 55.0
    assert "J" not in found["train"] and found["train"]["n"] == 4


def test_avsbench_stands_in_a_table_of_its_own(run: Path, tmp_path: Path) -> None:
    text = report(run, out=tmp_path / "p.html")
    table = section(text, "avsbench")
    for wanted in ("synthetic clips", "41.00", "51.00", "42.00", "50.00", "nothing about AVSBench"):
        assert wanted in table, wanted
    assert "AURORA (paper)" not in table and "77.3" not in table
    assert "41.00" not in section(text, "stages") and "s4 against" not in text and "against s4" not in text
    data = gallery(text)
    assert data["runs"] == ["teacher", "sft", "sft_zero", "s4"] and data["run"] == "sft"
    clips = [row for row in data["rows"] if "s4" in row["said"]]
    assert [(row["row"], row["split"], len(row["said"])) for row in clips] == [(2, "test", 1), (3, "test", 1)]
    others = {row["frames"] for row in data["rows"] if "s4" not in row["said"]}
    for row in clips:
        for address in (row["frames"], row["truth"], row["said"]["s4"]["masks"], row["said"]["s4"]["sound"]):
            assert address.startswith("p_files/avsbench_s4/") and address not in others
            assert (tmp_path / unquote(address)).is_file()


def test_s4_of_real_clips_stands_beside_table_6_and_ms3_has_no_classes(tmp_path: Path) -> None:
    write_s4(tmp_path / "eval_s4", tmp_path, files={"s4_meta_data.csv": "x"})
    table = section(report(tmp_path, "--no-media", out=tmp_path / "p.html"), "avsbench")
    for wanted in ("AURORA (paper)", "77.3", "86.7", "41.00", "51.00"):
        assert wanted in table, wanted
    assert "synthetic" not in table
    folder = write_s4(tmp_path / "eval_ms3", tmp_path, "avsbench_ms3")
    text = report(folder, "--no-media", out=tmp_path / "p.html")
    assert "protocol ms3" in text and "The paper leaves MS3 out" in text and "CRAB" not in text
    row = next(iter(find_evaluations(folder)[0].rows.values()))
    assert row.class_right is None and row.clip == "mini_test0000_0_5000"


def test_rows_of_two_benchmarks_are_never_paired(run: Path) -> None:
    found = {e.name: e for e in find_evaluations(run)}
    assert [(a.name, b.name) for a, b in pairs(found.values())] == [("teacher", "sft"), ("sft", "sft_zero")]
    with pytest.raises(DataError, match="sft is of refavs and .*s4 of avsbench_s4.*Remedy"):
        compare(found["sft"], found["s4"])


def test_a_missing_root_is_named_by_benchmark(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.html"
    assert report_command([str(run), "--data", "avsbench_s4=nowhere", "--out", str(out)]) == 1
    assert "nowhere: none of " in capsys.readouterr().err
    report(run, "--no-media", f"--data={run.parent / 'data'}", f"--data=avsbench_s4={run.parent / 's4'}", out=out)


def test_probes_of_two_stages_do_not_replace_each_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_world(tmp_path / "data"))
    write_evaluation(folder / "eval_grpo", tmp_path, checkpoint_sha256="g", stage="grpo")
    write_evaluation(folder / "eval_grpo_zero", tmp_path, checkpoint_sha256="g", stage="grpo", probe="zero_audio")
    summary = run_summary(find_evaluations(folder))
    assert {name: (p["stage"], p["probe"]) for name, p in summary["probes"].items()} == {
        "zero_audio": ("sft", "zero_audio"), "grpo_zero": ("grpo", "zero_audio"),
    }  # fmt: skip
    printed = summary_table(summary)
    assert "sft, zero_audio" in printed and "grpo, zero_audio" in printed
    page = report(folder, "--no-media", out=tmp_path / "p.html")
    assert "Probes of sft by question kind" in page and "Probes of grpo by question kind" in page


def test_a_probe_alone_has_its_tables(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval_sft_zero", tmp_path, probe="zero_audio")
    summary = run_summary(find_evaluations(folder))
    assert list(summary["stages"]) == ["sft_zero (zero_audio)"] and summary["probes"] == {}
    page = report(folder, "--no-media", out=tmp_path / "p.html")
    assert "(zero_audio)" in section(page, "stages") and "55.0" in section(page, "stages")
    assert "(zero_audio)" in section(page, "breakdown")


def test_one_protocol_alone_can_be_reported(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval_sft", tmp_path)
    for path in folder.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        for scores in (metrics["scores"], *metrics["scores"]["kinds"].values()):
            del scores["per_expression"]
        path.write_text(json.dumps({**metrics, "protocols": ["official"]}))
    assert stage_summary(folder)["mix"] == {"J": 55.0, "F": 65.0, "J&F": 60.0, "per_expression": {}}
    stages = section(report(folder, "--no-media", out=tmp_path / "p.html"), "stages")
    assert "Protocol official" in stages and "Protocol per_expression" not in stages


@pytest.mark.parametrize(
    ("value", "written"), [(0.04, "0.0"), (-0.04, "0.0"), (-0.06, "-0.1"), (0.06, "+0.1"), (0.0, "0.0")]
)
def test_no_difference_has_no_sign(value: float, written: str) -> None:
    assert signed(value, 1) == written
