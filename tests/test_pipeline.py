"""The list of commands: what is skipped, started again or removed, and the summary and page it ends in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation_cases import make_prediction, make_sample
from utils.evaluation import SplitTask, evaluate_split
from utils.pipeline import Pipeline, Step, StepError, locked
from utils.report.page import write_report
from utils.report.runs import find_evaluations, stage_summary, summary_table
from utils.types import Batch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import pathlib,sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.open('a').write('x')"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    return tmp_path


def step(project, name="one", folder="made", script=SCRIPT, **fields):
    output = project / folder / "out.txt"
    return Step(name, ("-c", script, str(output)), project / folder, output, ("config.yaml",), **fields)


def run(project, *steps):
    with locked(project / "runs/.lock", patience=0) as lock:
        pipeline = Pipeline(project, project / "runs", 1, lock)
        for each in steps:
            pipeline.run(each)
    return pipeline


def written(project, folder="made"):
    return (project / folder / "out.txt").read_text()


def test_a_step_may_have_a_number_of_processes_of_its_own(project):
    """And is done whatever that number was: another machine has other cores."""
    (project / "count.py").write_text(
        "import os, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True)\n"
        "p.open('a').write(os.environ.get('WORLD_SIZE', '1'))"
    )
    one = replace(step(project), command=("count.py", str(project / "made/out.txt")))
    run(project, replace(one, processes=2))
    run(project, one)
    assert written(project) == "22"
    run(project, replace(one, name="other", processes=1, parallel=True))
    assert written(project) == "221"


def test_a_done_step_is_skipped_and_a_lost_output_made_again(project, capfd):
    first = run(project, step(project))
    again = run(project, step(project))
    assert written(project) == "x" and again.seconds == first.seconds
    assert "== one: python -c" in capfd.readouterr().out
    (project / "made/out.txt").unlink()
    run(project, step(project))
    assert written(project) == "x"


def test_another_config_starts_in_an_empty_folder(project):
    run(project, step(project))
    (project / "made/old").write_text("")
    (project / "config.yaml").write_text("lr: 2\n")
    run(project, step(project))
    assert written(project) == "x" and not (project / "made/old").exists()


def test_a_change_reaches_the_steps_behind(project):
    later = step(project, "two", "later", needs=("one",))
    run(project, step(project), later)
    run(project, step(project), later)
    assert written(project, "later") == "x"
    run(project, step(project, script=SCRIPT + "; 0"), later)
    assert written(project) == "x" and written(project, "later") == "x"
    stamps = json.loads((project / "runs/steps/two.json").read_text())
    assert stamps["seconds"] > 0


def test_a_failed_step_keeps_its_folder_and_is_tried_again(project):
    failing = SCRIPT + "; sys.exit(pathlib.Path('broken').exists() * 3)"
    (project / "broken").write_text("")
    with pytest.raises(StepError, match="step one ended with status 3"):
        run(project, step(project, script=failing))
    (project / "broken").unlink()
    run(project, step(project, script=failing))
    assert written(project) == "xx"  # the folder was kept: the command itself may continue
    with pytest.raises(StepError, match="left no"):
        run(project, step(project, script="0"))


def test_two_runs_do_not_write_the_same_folder(project):
    with locked(project / "runs/.lock"), pytest.raises(StepError, match="another run is writing there"):
        run(project, step(project))


def test_a_killed_pipeline_takes_its_command_along(project):
    beat = project / "beat"
    loop = f"import time,pathlib\nwhile True:\n  pathlib.Path({str(beat)!r}).open('a').write('x'); time.sleep(.05)"
    code = (
        "from pathlib import Path; from utils.pipeline import Pipeline, Step, locked\n"
        f"p = Path({str(project)!r})\n"
        "with locked(p / 'runs/.lock') as lock:\n"
        f"  Pipeline(p, p / 'runs', 1, lock).run(Step('a', ('-c', {loop!r}), p / 'made', p / 'made/x', ()))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not beat.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    with locked(project / "runs/.lock", patience=60):  # the command holds it as long as it lives
        size = beat.stat().st_size
        time.sleep(0.5)
        assert beat.stat().st_size == size > 0


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
