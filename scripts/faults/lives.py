"""Lives of a command's processes: forked from a process that has imported everything, killed, or left to end.

Forking saves the ten seconds in which an interpreter loads torch and DeepSpeed; from there on the children run the
command's own `main` with the variables of a launcher. The parent does what torchrun does when a process is lost: it
sends SIGTERM to the others and, DEATH_SECONDS later, SIGKILL.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

DEATH_SECONDS = 30.0
"""Between SIGTERM and SIGKILL, as torchrun and DeepSpeed's launcher have it."""
POLL = 0.01


@dataclass(frozen=True)
class Kill:
    """SIGKILL at a moment of a life."""

    after: float
    """Seconds from the start."""
    victims: tuple[int, ...]
    """Ranks."""


@dataclass(frozen=True)
class Life:
    """What became of one start."""

    status: int
    """0 = done; -9 = killed as planned; else the first other exit status."""
    seconds: float
    detected: float | None
    """Seconds from the kill of some ranks until the others were gone; None if all were killed or none."""
    first_work: float | None
    """Seconds from the start until new work was on disk."""


def draw_kill(rng: random.Random, duration: float, ranks: int) -> Kill:
    """A moment of an undisturbed life, and one rank or all."""
    one = rng.random() < 0.5
    return Kill(rng.uniform(0.0, duration), (rng.randrange(ranks),) if one else tuple(range(ranks)))


def live(main: Callable[[], int], ranks: int, log: Path, work: Callable[[], int], kill: Kill | None = None) -> Life:
    """Run `main` in `ranks` processes until all are gone.

    Args:
        main: the command; returns its exit status.
        ranks: processes.
        log: gets what they print (appended).
        work: bytes of finished work on disk.
        kill: None = undisturbed.
    """
    least = work()  # before anything of theirs can be there
    port, start = _free_port(), time.monotonic()
    running = {_fork(main, rank, ranks, port, log): rank for rank in range(ranks)}
    statuses: list[int] = []
    struck = told = ended = first_work = None
    while running:
        now = time.monotonic()
        if kill and struck is None and now - start >= kill.after:
            struck = now
            for pid in [pid for pid, rank in running.items() if rank in kill.victims]:
                _kill_tree(pid, whole=len(kill.victims) == ranks)
        if told is not None and now - told > DEATH_SECONDS:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        statuses += _ended(running)
        if told is None and any(statuses):
            told = now
            for pid in running:
                os.kill(pid, signal.SIGTERM)
        size = work()
        least = min(least, size)
        if first_work is None and size > least:
            first_work = now - start
        time.sleep(POLL)
    ended = time.monotonic()
    killed = struck is not None and -signal.SIGKILL in statuses
    status = -signal.SIGKILL if killed else next((s for s in statuses if s), 0)
    partly = killed and len(kill.victims) < ranks
    return Life(status, ended - start, ended - struck if partly else None, first_work)


def _fork(main: Callable[[], int], rank: int, ranks: int, port: int, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    atexit._clear()  # what the parent has registered is the parent's
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except Exception:  # noqa: BLE001 - what the interpreter itself does at the end of a command
        os.write(2, traceback.format_exc().encode())  # sys.stderr may be another file than the log
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(running: dict[int, int]) -> list[int]:
    """Exit statuses (negative for a signal) of those that are gone, which are taken out of `running`."""
    found = []
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del running[pid]
            found.append(os.waitstatus_to_exitcode(status))
    return found


def _kill_tree(pid: int, whole: bool) -> None:
    """SIGKILL; with the decoding processes of the rank, or of the rank alone."""
    process = psutil.Process(pid)
    for victim in [*(process.children(recursive=True) if whole else ()), process]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
