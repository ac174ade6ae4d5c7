"""What a person or a file sees of a running command: every message on a line of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

from tests.tiny_run import ROOT
from utils import log, progress
from utils.progress import Progress, counted

SCRIPT = """
import fcntl, struct, sys, termios
if sys.stderr.isatty():
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", *map(int, sys.argv[1:3]), 0, 0))
from utils import log, progress
from utils.errors import tell
progress.BETWEEN_LINES = 0.0
with progress.Progress("teacher", 3, "steps", done=1) as bar:
    bar.update()
    tell("a message")
    bar.note = "loss 0.5"
    bar.update()
"""


def on_a_terminal(rows: int, columns: int) -> list[str]:
    """The lines that stand there at the end; a carriage return starts a line anew."""
    main, other = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, str(rows), str(columns)]
    child = subprocess.Popen(command, cwd=ROOT, stderr=other, stdout=other)
    os.close(other)
    printed = b""
    try:
        while chunk := os.read(main, 4096):
            printed += chunk
    except OSError:  # Linux says so when the last process has closed it
        pass
    os.close(main)
    assert child.wait() == 0, printed
    lines = printed.decode().replace("\r\n", "\n").split("\n")
    return [line.split("\r")[-1] for line in lines if line]


def test_a_message_beside_a_bar_has_its_own_line() -> None:
    message, bar = on_a_terminal(40, 100)
    assert message == "a message"
    assert bar.startswith("teacher 3/3 steps |") and "gone" in bar and bar.endswith("loss 0.5")


def test_a_file_and_a_terminal_without_size_get_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = ["teacher 2/3 steps, 00:00 gone, 00:00 left", "a message",
              "teacher 3/3 steps, 00:00 gone, 00:00 left, loss 0.5"]  # fmt: skip
    assert done.stderr.splitlines() == wanted and not done.stdout
    assert on_a_terminal(0, 0) == wanted


def test_lines_are_rare_and_tell_what_is_left(monkeypatch, capsys) -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(counted("abc", 4, "media", "clips")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "media 2/4 clips, 00:31 gone, 00:31 left\n"


def test_hidden_progress_shows_nothing(capsys) -> None:
    with Progress("teacher", 2, "steps", hidden=True) as hidden:
        hidden.told = time.monotonic() - 2 * progress.BETWEEN_LINES
        hidden.update(2)
    assert hidden.done == 2 and not capsys.readouterr().err


def test_a_message_tells_its_level_and_process_only_where_that_is_news(monkeypatch, capsys) -> None:
    logger = log.setup_logging()
    logger.info("%d rows", 4)
    logger.warning("few rows")
    monkeypatch.setattr(log.distributed, "world_size", lambda: 2)
    logger.info("done")
    logger.warning("few rows")
    assert capsys.readouterr().err.splitlines() == [
        "4 rows", "warning: few rows", "done", "warning [process 0]: few rows"
    ]  # fmt: skip
