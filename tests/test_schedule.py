"""Steps beside each other: what may begin, who has which cores, what is shown."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.test_pipeline import step
from utils.pipeline import Pipeline, StepError, locked
from utils.schedule import core_shares, elapsed, run_all, startable

MEET = (
    "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.write_text('x')\n"
    "deadline = time.time() + 30\n"
    "while not all((p.parents[1] / name / 'out.txt').exists() for name in {others!r}):\n"
    "    assert time.time() < deadline; time.sleep(.01)\n"
)
"""Writes its file and waits for those of others."""


def named(*steps):
    return {each.name: each for each in steps}


def names(steps):
    return [each.name for each in steps]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    return tmp_path


def run(project: Path, steps, jobs: int, quiet: bool = False) -> Pipeline:
    with locked(project / "runs/.lock", patience=0) as lock:
        finished = Pipeline(project, project / "runs", 1, lock)

        def pipeline(cores):
            return Pipeline(project, project / "runs", 1, lock, cores=cores, quiet=quiet).sharing(finished)

        run_all(steps, jobs, pipeline)
    return finished


def test_what_may_begin(project):
    one, two = step(project, "one"), step(project, "two")
    behind = step(project, "behind", needs=("one",))
    training = step(project, "training", alone=True)
    assert names(startable(named(one, two, behind), [], 3)) == ["one", "two"]
    assert names(startable(named(one, two, behind), [], 1)) == ["one"]
    assert names(startable(named(behind, two), [one], 1)) == ["two"]
    assert names(startable(named(behind), [], 1)) == ["behind"]
    assert startable(named(two), [training], 1) == []
    assert names(startable(named(training, two), [], 2)) == ["training"]


def test_nothing_overtakes_a_step_that_waits_for_the_whole_machine(project):
    one, two, training = step(project, "one"), step(project, "two"), step(project, "training", alone=True)
    assert startable(named(training, two), [one], 1) == []
    assert names(startable(named(one, training, two), [], 2)) == ["one"]
    behind = step(project, "behind", needs=("one",), alone=True)
    assert names(startable(named(behind, two), [one], 1)) == ["two"]


def test_a_leading_step_has_its_turn_before_others(project):
    one, two = step(project, "one"), step(project, "two")
    training = step(project, "training", leading=True)
    assert names(startable(named(one, two, training), [], 1)) == ["training"]
    assert names(startable(named(one, two, training), [], 3)) == ["training", "one", "two"]
    assert names(startable(named(one, two), [training], 1)) == ["one"], "others run beside it"
    behind = step(project, "behind", needs=("one",), leading=True)
    assert names(startable(named(one, two, behind), [], 1)) == ["one"], "it waits for what it needs"


def test_steps_run_beside_each_other(project):
    """Each of two waits for the other's file: one after the other they would fail."""
    pair = [step(project, n, n, MEET.format(others=["a", "b"])) for n in ("a", "b")]
    behind = step(project, "c", "c", MEET.format(others=["a", "b"]), needs=("a", "b"))
    finished = run(project, [*pair, behind], jobs=2)
    spans = finished.spans
    assert spans["c"][0] >= max(spans["a"][1], spans["b"][1]) - 0.01
    assert elapsed(spans.values()) < sum(finished.seconds.values())


def test_output_of_quiet_steps_is_whole(project, capfd):
    script = MEET.format(others=["a", "b"]) + "print('1 of', sys.argv[1][-9]); time.sleep(.3); print('2 of it')\n"
    run(project, [step(project, n, n, script) for n in ("a", "b")], jobs=2, quiet=True)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("1 of", "2 of"))]
    assert sorted(lines[::2]) == ["1 of a", "1 of b"] and lines[1::2] == ["2 of it"] * 2
    assert (project / "runs/steps/a.log").read_text() == "1 of a\n2 of it\n"


def test_a_failure_ends_what_runs_beside_it(project):
    endless = "import time; time.sleep(600)"
    with pytest.raises(StepError, match="bad ended with status 3"):
        run(project, [step(project, "long", "long", endless), step(project, "bad", script="raise SystemExit(3)")], 2)
    finished = run(project, [step(project, "long", "long")], 2)
    assert finished.seconds.keys() == {"long"}


def test_a_stop_reaches_a_command_that_is_being_started(project):
    with locked(project / "runs/.lock", patience=0) as lock:
        pipeline = Pipeline(project, project / "runs", 1, lock)
        pipeline.stop()
        began = time.monotonic()
        with pytest.raises(StepError, match="ended with status"):
            pipeline.run(step(project, script="import time; time.sleep(600)"))
        assert time.monotonic() - began < 60


def test_a_step_keeps_to_its_share_and_one_alone_or_leading_has_all(project):
    script = ("import os, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True)\n"
              "p.write_text(repr(sorted(os.sched_getaffinity(0))))")  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(2, len(cores))
    whole = [step(project, "b", "b", script, alone=True), step(project, "c", "c", script, leading=True)]
    run(project, [step(project, "a", "a", script), *whole], jobs)
    assert (project / "b/out.txt").read_text() == (project / "c/out.txt").read_text() == repr(cores)
    shares = [repr(sorted(share or cores)) for share in core_shares(jobs)]
    assert (project / "a/out.txt").read_text() in shares


def test_elapsed_counts_shared_time_once():
    assert elapsed([(0, 10), (5, 7), (8, 12), (20, 21)]) == 13
    assert elapsed([]) == 0
