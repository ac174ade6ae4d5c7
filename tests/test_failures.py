"""How a command ends when the disk, another process or the GPU's memory fails: in words, with a remedy."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

import pytest
import torch

from scripts.plan_memory import main
from tests.tiny_run import make_tiny_run
from utils import errors
from utils.distributed import memory_advice
from utils.errors import AuroraError, run_command

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


def test_a_command_ends_with_its_own_status() -> None:
    assert [run_command(lambda status=status: status) for status in (None, 0, 3, "text")] == [0, 0, 3, 0]

    def broken() -> None:
        raise AuroraError("x = 1: too small. Remedy: 2.")

    assert run_command(broken) == 1 and run_command(broken, failed=2) == 2


def test_one_of_several_processes_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(errors, "leave", left.append)
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

