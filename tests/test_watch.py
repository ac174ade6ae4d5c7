"""Warnings of a run that goes wrong quietly, and the end on SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_ds
from configs.schema import WatchConfig
from tests.aurora_cases import run_config, tiny_batch, tiny_sample
from utils.checkpoint import Progress
from utils.distributed import StopSignal
from utils.log import RunLog, Watch
from utils.types import StepLoss

SMALL = WatchConfig(window=4)


def test_repeated_answers_and_missing_seg_are_warned_once_until_over() -> None:
    watch = Watch(SMALL)
    assert watch.answers(1, ["a [SEG]", "b [SEG]"], [True, True]) == []
    assert watch.answers(2, ["c [SEG]", "d [SEG]"], [True, True]) == []
    found = watch.answers(3, ["x"] * 4, [False] * 4)
    assert len(found) == 2 and "4 of the last 4 answers are the same: 'x'" in found[0]
    assert "only 0 of the last 4 answers hold [SEG]" in found[1] and all("Remedy" in text for text in found)
    assert watch.answers(4, ["x"], [False]) == []
    assert watch.answers(5, ["a", "b", "c", "d"], [True] * 4) == []
    assert len(watch.answers(6, ["x"] * 4, [False] * 4)) == 2


def test_reward_and_entropy_collapse_are_warned() -> None:
    watch = Watch(SMALL)
    assert not [w for step in range(8) for w in watch.metrics(step, {"reward_all": 1.0, "entropy": 0.5})]
    found = [w for step in range(8, 16) for w in watch.metrics(step, {"reward_all": 0.1, "entropy": 0.001})]
    assert len(found) == 2 and "mean reward" in found[0] and "it was 1.000" in found[0]
    assert "mean entropy" in found[1] and "grpo.temperature" in found[1]
    assert Watch(SMALL).metrics(1, {"loss": 1.0}) == []


def test_a_first_step_of_cut_answers_is_warned_with_the_number_to_set() -> None:
    (text,) = Watch(SMALL, 150).metrics(1, {"truncated_share": 0.25})
    assert "25% of the answers were cut at grpo.max_new_tokens = 150" in text
    assert "set grpo.max_new_tokens to 300" in text
    watch = Watch(SMALL, 150)
    assert watch.metrics(1, {"truncated_share": 0.2}) == [] == watch.metrics(2, {"truncated_share": 0.9})


def test_sigterm_is_noted_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(60.0)
    assert not stop.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("saved_before", [0, 1])
def test_sigterm_ends_the_run_where_it_is_saved(saved_before: int, tmp_path: Path) -> None:
    """Before the first step nothing is saved, and while a checkpoint is written the same state is not saved twice."""
    config = run_config(log={"save_every": 2, "tensorboard": False}, optim={"steps": 9, "warmup_steps": 0})
    engine = mock.Mock(get_lr=lambda: [1.0], get_global_grad_norm=lambda: 1.0)
    item = mock.Mock(batch=tiny_batch(tiny_sample(0)), answers=None)
    losses = StepLoss(torch.ones(()), {"loss": torch.ones(())})
    stage = mock.Mock(updates=1, prepare=lambda _: item, loss=lambda _: losses)
    progress, stop = Progress(), StopSignal(60.0)
    log = RunLog(tmp_path, config)
    run = train_ds.train(engine, stage, repeat(tiny_batch(tiny_sample(0))), config, progress, log, stop)
    for _ in range(saved_before):
        next(run)
    os.kill(os.getpid(), signal.SIGTERM)
    assert list(run) == [] and progress.step == 2 * saved_before
    log.close()
    stop.close()


def status_of_child(action: Callable[[], object]) -> int:
    """Exit status of a forked process; one that never ends is ended after a minute, so that a fault is no hang."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_too_late_ends_the_process() -> None:
    def never_saved() -> None:
        StopSignal(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(1)

    began = time.monotonic()
    assert status_of_child(never_saved) == -signal.SIGALRM and time.monotonic() - began < 30


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", ""])
def test_a_killed_launcher_stops_its_processes_and_no_other_parent_does(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launcher:
        monkeypatch.setenv(launcher, "x")

    def start() -> None:
        if os.fork() == 0:
            stop, began = StopSignal(60.0), time.monotonic()
            (tmp_path / "up").touch()
            while not stop.requested() and time.monotonic() < began + 2 + 28 * bool(launcher):
                time.sleep(0.05)
            (tmp_path / "asked.part").write_text(str(stop.requested()))
            (tmp_path / "asked.part").rename(tmp_path / "asked")
            os._exit(0)
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    assert status_of_child(start) == -signal.SIGKILL
    while not (tmp_path / "asked").exists():
        time.sleep(0.05)
    assert (tmp_path / "asked").read_text() == str(bool(launcher))
