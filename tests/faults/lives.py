"""Lives of a command's processes: forked from a process that has imported everything, killed, or left to end.

Forking saves the ten seconds in which an interpreter loads torch and DeepSpeed; from there on the children run the
command's own `main` with the variables of a launcher. The parent does what torchrun does when a process is lost: it
sends SIGTERM to the others and, DEATH_SECONDS later, SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
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
    running = [_start(main, rank, ranks, port, log) for rank in range(ranks)]
    statuses: list[int] = []
    struck = told = ended = first_work = None
    while running:
        now = time.monotonic()
        if kill and struck is None and now - start >= kill.after:
            struck = now
            for process in [p for p in running if p.name in map(str, kill.victims)]:
                _kill_tree(process.pid, whole=len(kill.victims) == ranks)
        if told is not None and now - told > DEATH_SECONDS:
            for process in running:
                process.kill()
        gone = {p: code for p in running if (code := p.exitcode) is not None}
        statuses += gone.values()
        running = [p for p in running if p not in gone]
        if told is None and any(statuses):
            told = now
            for process in running:
                process.terminate()
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


def _start(main: Callable[[], int], rank: int, ranks: int, port: int, log: Path) -> BaseProcess:
    """A forked process, named by its rank, that runs `main` and prints to `log`."""

    def run() -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            status = main()
        except Exception:  # noqa: BLE001 - what the interpreter itself does at the end of a command
            os.write(2, traceback.format_exc().encode())  # sys.stderr may be another file than the log
            status = 1
        sys.exit(status)

    process = multiprocessing.get_context("fork").Process(target=run, name=str(rank))
    process.start()
    return process


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
