"""scripts/ablate.py --jobs: several runs at a time; our study of stage 3."""

from __future__ import annotations

import csv
import io
import os
import signal
from pathlib import Path

import pytest

from scripts.ablate import main
from scripts.ablation.graph import STUDY_TRAININGS
from tests.ablation_case import ROOT, log, make_project
from utils.schedule import core_shares


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes folder and the handler of SIGTERM; both are put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_several_at_a_time_respect_what_needs_what(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    assert main(["--table", "3", "--seeds", "2", "--jobs", "2"], project) == 0
    made = log(project)
    runs = ["teacher", "wo_distill", "cot", "eval_wo_distill", "eval_cot"]
    assert sorted(made) == sorted(["make_mini_world", *runs * 2])
    assert made[0] == "make_mini_world" and "teacher" in made[1:3]
    for before, after in (("teacher", "cot"), ("cot", "eval_cot"), ("wo_distill", "eval_wo_distill")):
        assert made.index(before) < made.index(after)
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    with pytest.raises(SystemExit):
        main(["--table", "3", "--jobs", "2", "--scale", "paper"], project)


def test_cores_are_shared_without_overlap() -> None:
    cores = sorted(os.sched_getaffinity(0))
    shares = core_shares(len(cores))
    assert core_shares(1) == [None] and core_shares(len(cores) + 1) == [None] * (len(cores) + 1)
    assert len(cores) == 1 or sorted(core for share in shares for core in share) == cores


def test_study_compares_with_its_start(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    assert main(["--table", "grpo", "--seeds", "2", "--jobs", "2"], project) == 0
    made = log(project)
    assert {name for name in made if not name.startswith("eval_")} == {
        "make_mini_world",
        "teacher",
        "cot",
        *(name for name in STUDY_TRAININGS if name.startswith("early")),
    }
    text = (project / "runs/ablations/mini/table_grpo.md").read_text()
    assert text.startswith("# What stage 3 changes") and "paper" not in text.split("| row |")[1]
    assert "| J | F | J&F | class accuracy | faithful | seeds |" in text and "J&F against the first row" in text
    lines = list(csv.DictReader(io.StringIO((project / "runs/ablations/mini/table_grpo.csv").read_text())))
    assert {line["score"] for line in lines} == {"J", "F", "J&F", "class_accuracy", "faithful"}
    with pytest.raises(SystemExit):
        main(["--table", "grpo", "--scale", "paper"], project)
