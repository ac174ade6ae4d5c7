"""Warnings of a run that goes wrong quietly, and the end on SIGTERM."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from itertools import repeat
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_ds
from configs.schema import WatchConfig
from tests.aurora_cases import run_config, tiny_batch, tiny_sample
from utils.checkpoint import Progress
from utils.log import RunLog
from utils.preempt import Preemption
from utils.types import StepLoss
from utils.watch import Watch

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
    preemption = Preemption(60.0)
    assert not preemption.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.agreed()
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_during_a_save_ends_the_run_there(tmp_path: Path) -> None:
    """Another step and a second save would not fit into what is left of the notice."""
    config = run_config(log={"save_every": 2, "tensorboard": False}, optim={"steps": 9, "warmup_steps": 0})
    engine = mock.Mock(get_lr=lambda: [1.0], get_global_grad_norm=lambda: 1.0)
    item = mock.Mock(batch=tiny_batch(tiny_sample(0)), answers=None)
    losses = StepLoss(torch.ones(()), {"loss": torch.ones(())})
    stage = mock.Mock(updates=1, prepare=lambda _: item, loss=lambda _: losses)
    progress, preemption = Progress(), Preemption(60.0)
    log = RunLog(tmp_path, config)
    run = train_ds.train(engine, stage, repeat(tiny_batch(tiny_sample(0))), config, progress, log, preemption)
    next(run)
    assert progress.step == 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert list(run) == [] and progress.step == 2
    log.close()
    preemption.close()


def forked() -> int:
    """os.fork; a child that never ends is ended after a minute, so that a fault is no hang."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
    return child


def test_too_late_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    child = forked()
    if child == 0:
        preemption = Preemption(0.2)
        preemption.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.sigtimedwait([], 0.1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    told = capfd.readouterr().err
    assert "had not saved; the newest complete checkpoint is intact. Remedy: raise log.grace_seconds" in told


def test_sigterm_while_loading_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    child = forked()
    if child == 0:
        Preemption(60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.sigtimedwait([], 0.1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_time_runs_though_python_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    """As inside a collective: the main thread stays in C, where no handler of Python's runs."""
    child = forked()
    if child == 0:
        Preemption(0.2).begin()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        libc = ctypes.CDLL(None)  # releases the GIL while it is called
        while True:
            libc.pause()
            libc.sleep(60)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert "had not saved" in capfd.readouterr().err


def test_a_full_disk_behind_stderr_does_not_keep_it_alive() -> None:
    child = forked()
    if child == 0:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        os.dup2(2, 1)
        Preemption(0.2).begin()
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.sigtimedwait([], 0.1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
