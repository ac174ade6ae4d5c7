"""How a command ends when the disk, another process or the GPU's memory fails: in words, with a remedy."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from scripts.plan_memory import main
from tests.tiny_run import ROOT, make_tiny_run
from utils import failures
from utils.failures import memory_advice, run_command

INTACT = "the last checkpoint is intact"


def end(error: BaseException) -> int:
    def action() -> None:
        raise error

    return run_command(action, INTACT, lambda: "Most of it activations. Remedy: engine.micro_batch=1.")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), ["No space left on device", "free space"]),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), ["Read-only file system", "'runs/x'", "rights"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), ["Permission denied", "rights"]),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"),
            ["a decoding process was lost", "data.num_workers"],
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            ["Tried to allocate 2.00 GiB. Most of it activations.", "engine.micro_batch=1"],
        ),
    ],
)
def test_what_can_be_repaired_is_said_in_words(
    error: BaseException, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(error) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "Traceback" not in printed and len(printed.splitlines()) == 1
    assert all(part in printed for part in [*parts, "Remedy"]) and INTACT.lower() in printed.lower()


def test_other_errors_keep_their_traceback() -> None:
    for error in (RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyError("x")):
        with pytest.raises(type(error)):
            end(error)


def test_one_of_several_processes_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    monkeypatch.setattr(failures, "leave", left.append)
    lost = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:42077"
    end(RuntimeError(lost))
    printed = capsys.readouterr().err
    assert left == [1] and "another process of this run was lost" in printed and "Traceback" not in printed
    with pytest.raises(KeyError):
        end(KeyError("x"))
    assert left == [1, 1] and "KeyError" in capsys.readouterr().err
    assert run_command(lambda: None, INTACT, str) == 0 and left == [1, 1, 0]


def test_the_advice_is_a_command_that_names_the_cheapest_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = memory_advice(str(make_tiny_run(tmp_path)), ["engine.zero_stage=2", "data.answer=plain"])
    command = shlex.split(advice.partition("python ")[2].rstrip("."))
    assert command[0] == "scripts/plan_memory.py" and main(command[1:]) == 0  # it fits, and yet a change is named
    assert "The cheapest change:\n  engine.zero_stage=" in capsys.readouterr().out


def test_processes_end_with_a_killed_launcher(tmp_path: Path) -> None:
    code = "import time; from utils.parent import end_with_launcher; end_with_launcher(); print('up', flush=True); "
    launcher = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {code + 'time.sleep(60)'!r}]); print(child.pid, flush=True); "
        "time.sleep(60)"
    )
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    with subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "up\n"
        process.kill()
        end_by = time.monotonic() + 55  # the process itself ends after 60
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end_by
            time.sleep(0.05)
