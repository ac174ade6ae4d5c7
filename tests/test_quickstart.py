"""scripts/quickstart.sh with stand-ins for its commands: what is skipped, continued and made anew; what it ends in."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import summarise
from scripts.summarise import elapsed
from tests.ablation_case import COMMON, ROOT, log, make_project
from tests.evaluation_cases import make_prediction, make_sample
from utils.evaluation import SplitTask, evaluate_split
from utils.report.page import write_report
from utils.report.runs import find_evaluations, stage_summary, summary_table
from utils.types import Batch

STEPS = ["world", "teacher", "sft", "mine", "correct", "compose", "eval_teacher", "eval_sft", "eval_sft_shuffle_audio",
         "eval_sft_shuffle_video", "taxonomy", "reflective", "eval_reflective", "grpo", "eval_grpo"]  # fmt: skip
EVALUATE = COMMON + """
note(pathlib.Path(arguments["eval.output_dir"]).name)
if pathlib.Path("broken-" + pathlib.Path(arguments["eval.output_dir"]).name).exists():
    print("this is wrong")
    sys.exit(3)
for split in arguments["eval.splits"].strip("[]").split(","):
    folder = pathlib.Path(arguments["eval.output_dir"]) / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("{}")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Empty rooms, stand-ins for every command, and the quickstart itself."""
    folder = make_project(tmp_path / "project")
    for name in ("dataset", "model", "utils"):
        (folder / name).mkdir()
    for name in ("types", "answers", "engine", "evaluation", "metrics", "scoring"):
        (folder / f"utils/{name}.py").touch()
    shutil.copy(ROOT / "scripts/quickstart.sh", folder / "scripts")
    (folder / "scripts/setup.sh").write_text("")
    shutil.copy(folder / "scripts/correct_paths.py", folder / "scripts/analyze_failures.py")
    (folder / "scripts/summarise.py").write_text("print('summary')")
    (folder / "train_ds_test.py").write_text(EVALUATE)
    (folder / "bin").mkdir()
    python = folder / "bin/python"  # one process where torchrun, which takes seconds, would start several
    python.write_text(f'#!/bin/sh\nif [ "$2" = torch.distributed.run ]; then shift 5; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def command(*options: str) -> list[str]:
    return ["bash", "scripts/quickstart.sh", *options]


def environment(project: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{project}/bin:{os.environ['PATH']}"}


def start(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    variables = environment(project)
    return subprocess.run(command(*options), cwd=project, env=variables, capture_output=True, text=True, check=False)


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^== (\w+): python", done.stdout, re.M)


def test_every_step_once_in_an_order_that_serves_it(project: Path) -> None:
    done = start(project)
    assert done.returncode == 0 and "summary\n" in done.stdout, done.stdout + done.stderr
    order = ran(done)
    assert sorted(order) == sorted(STEPS)
    for before, after in (("teacher", "sft"), ("sft", "mine"), ("mine", "correct"), ("compose", "reflective"),
                          ("reflective", "grpo"), ("grpo", "eval_grpo"), ("eval_reflective", "eval_grpo")):  # fmt: skip
        assert order.index(before) < order.index(after)
    again = start(project)
    assert again.returncode == 0 and ran(again) == [] and again.stdout.count(": done before") == len(STEPS)
    more = start(project, "--full")
    added = ran(more)  # an evaluation runs beside the next training, so either may be told of first
    assert sorted(added) == ["eval_sft_plain", "eval_sft_without_null", "sft_plain", "sft_without_null"]
    assert all(added.index(name) < added.index(f"eval_{name}") for name in ("sft_plain", "sft_without_null"))
    (project / "runs/quickstart/eval_sft/test_n/metrics.json").unlink()
    assert ran(start(project)) == ["eval_sft"]
    (project / "train_ds.py").open("a").write("\n")
    (project / "runs/quickstart/sft/old").touch()
    assert sorted(ran(start(project))) == sorted(STEPS) and not (project / "runs/quickstart/sft/old").exists()
    other = start(project, "--seed=1", "--num_gpus", "2", "--out", "runs/other")
    assert "== sft: python -m torch.distributed.run" in other.stdout and "engine.micro_batch=12" in other.stdout


def test_a_failure_is_named_ends_what_runs_and_is_tried_again(project: Path) -> None:
    (project / "broken-eval_sft").touch()
    done = start(project)
    assert done.returncode == 1 and "summary" not in done.stdout
    assert "step eval_sft failed or left no" in done.stdout and "runs/quickstart/steps/eval_sft.log" in done.stdout
    assert "this is wrong" in (project / "runs/quickstart/steps/eval_sft.log").read_text()
    (project / "broken-eval_sft").unlink()
    done = start(project)
    assert done.returncode == 0 and {"eval_sft", "eval_grpo"} <= {*ran(done)} and "teacher" not in ran(done)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_quickstart_continues(number: signal.Signals, project: Path) -> None:
    """After SIGKILL its command lives on; the next start waits for it and finds its work. After SIGTERM it is ended."""
    (project / "hold-sft").touch()
    first = subprocess.Popen(command(), cwd=project, env=environment(project), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while "sft" not in ((project / "log.txt").read_text().split() if (project / "log.txt").exists() else []):
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(number)
    first.wait(timeout=60)
    second = subprocess.Popen(command(), cwd=project, env=environment(project), stdout=subprocess.PIPE, text=True)
    time.sleep(1.0)
    (project / "hold-sft").unlink()
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and out.endswith("index.html\n"), out
    assert ("waiting for what an earlier one left running" in out) == (number == signal.SIGKILL)
    assert "teacher: done before" in out
    attempts = (project / "runs/quickstart/sft/attempts").read_text()  # in a folder that was kept
    assert attempts == ("x" if number == signal.SIGKILL else "xx")


@pytest.mark.parametrize("options", [["--num_gpus", "0"], ["--num_gpus", "5"], ["--seed", "x"], ["--out"], ["--what"]])
def test_wrong_options_are_refused(options: list[str], project: Path) -> None:
    done = start(project, *options)
    assert done.returncode == 2 and "quickstart: " in done.stderr and log(project) == []


def test_help_is_its_head(project: Path) -> None:
    assert "--num_gpus N" in start(project, "--help").stdout


def test_elapsed_counts_shared_time_once() -> None:
    assert elapsed([(0, 10), (5, 7), (8, 12), (20, 21)]) == 13
    assert elapsed([]) == 0


def evaluation(folder, split, first, kind="visual", **fields):
    rows = tuple(range(first, first + 8))
    samples = [make_sample(row, kind=kind, split=split, **fields) for row in rows]
    pictures = frozenset({first + 1})
    task = SplitTask(folder / split, split, rows, ("official", "per_expression"), 4, pictures=pictures)

    def load(positions):
        for start in range(0, len(positions), 4):
            chosen = [samples[i] for i in positions[start : start + 4]]
            yield Batch(chosen, None, None, None, [s.masks for s in chosen])

    return evaluate_split(task, load, lambda b: [make_prediction(s) for s in b.samples], lambda s: s.frames)


def test_summary_and_page_of_an_evaluation(tmp_path):
    folder = tmp_path / "eval"
    seen, unseen = evaluation(folder, "test_s", 0), evaluation(folder, "test_u", 8, frames=3)
    null = evaluation(folder, "test_n", 16, class_name="null", empty=True)
    found = stage_summary(folder)
    assert found["test_s"]["J"] == seen["official"]["J"] and found["test_s"]["n"] == 8
    assert found["test_u"]["per_expression"]["F"] == unseen["per_expression"]["F"]
    assert found["test_n"]["S"] == null["official"]["S"] and "J" not in found["test_n"]
    assert found["mix"]["J&F"] == (found["test_s"]["J&F"] + found["test_u"]["J&F"]) / 2
    assert found["kinds"]["visual"]["J"] == found["test_s"]["J"]
    assert found["class_accuracy"] == seen["class_accuracy"]
    probes = {"shuffle_audio": {"stage": "sft", **found}}
    summary = {"stages": {"sft": found}, "probes": probes, "seconds": {"sft": 1.0}}
    table = summary_table(summary)
    assert "sft, shuffle_audio" in table and "test_n" in table
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    runs = [("sft", tmp_path / "sft")]
    write_report(tmp_path / "index.html", "t", find_evaluations(tmp_path), summary=summary, runs=runs)
    page = (tmp_path / "index.html").read_text()
    data = json.loads(re.search(r'id="gallery">(.*?)</script>', page, re.S)[1])
    assert [(row["row"], row["split"]) for row in data["rows"]] == [(1, "test_s"), (9, "test_u"), (17, "test_n")]
    assert data["rows"][2]["said"]["eval"]["strip"] == "eval/test_n/pictures/00017.jpg"
    assert page.count("<figure><img") == 1 and "Probes of sft by question kind" in page


def test_summary_of_what_the_steps_left(tmp_path, monkeypatch):
    monkeypatch.setattr(summarise, "media_of", lambda *_: None)  # the pictures that the evaluations drew are shown
    first = tmp_path / "eval_sft"
    evaluation(first, "test_s", 0), evaluation(first, "test_n", 16, class_name="null", empty=True)
    for name in ("teacher", "reflective", "grpo", "sft_shuffle_audio", "sft_shuffle_video"):
        shutil.copytree(first, tmp_path / f"eval_{name}")
    (tmp_path / "steps").mkdir()
    stamps = {"sft": "key\n10 20.04\n", "eval_sft": "key\n15 30\n", "grpo": "key\n", "sft.log": "a\nb\n"}
    for name, text in stamps.items():
        (tmp_path / "steps" / name).write_text(text)
    assert summarise.main(["--out", str(tmp_path), "--seed", "3"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [*summary["stages"]] == ["sft", "teacher", "reflective", "grpo"]
    assert {name: probe["stage"] for name, probe in summary["probes"].items()} == {
        "shuffle_audio": "sft", "shuffle_video": "sft"
    }  # fmt: skip
    assert summary["seconds"] == {"eval_sft": 15.0, "sft": 10.0, "total": 20.0} and summary["config"]["seed"] == 3
    assert (tmp_path / "index.html").stat().st_size > 10_000
