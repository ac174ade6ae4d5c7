"""Processes of a run: start, exchange of small values, orderly end; under `deepspeed`, `torchrun` or plain python."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.ds import deepspeed
from utils.parent import end_with_launcher

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Longest wait inside a step, where all processes do the same work."""
UNLIMITED = timedelta(days=365)
"""Of the waits after unequal work (evaluation, mining, saving): gloo has no word for "no limit"."""
NOTICE = 60.0
"""Seconds of waiting after which a process says for whom, and again every so often."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "remote process",
        "Socket Timeout", "Timed out waiting", "NCCL communicator was aborted", "failed to recv, got 0 bytes",
        "failed to connect")  # fmt: skip
"""What gloo, NCCL and the store say when another process is gone."""


def start(threads: int | None = None) -> torch.device:
    """Join the process group (a group of one without a launcher) and return this process's device.

    Args:
        threads: CPU threads of this process; None = cores / processes on this machine.
    """
    end_with_launcher()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // processes))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", timeout=TIMEOUT, verbose=False)
    global _patient
    _patient = _Patient.join() if world_size() > 1 else None
    return device


@dataclass
class _Patient:
    """Exchanges without a limit of time, which end all the same when a process is lost (its connections close)."""

    group: dist.ProcessGroup
    arrivals: dist.Store
    """Number of the last wait that each process has come to, under its rank."""
    waits: int = 0

    @classmethod
    def join(cls) -> _Patient:
        """All processes call it."""
        server = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
        arrivals = dist.PrefixStore("aurora arrivals", server)
        arrivals.set(str(rank()), "0")  # torchrun's store outlives an attempt
        return cls(dist.new_group(backend="gloo", timeout=UNLIMITED), arrivals)

    @contextlib.contextmanager
    def waiting(self, work: str) -> Iterator[None]:
        """For one exchange; a thread names those who have not come to it, whatever the main thread is stuck in."""
        self.waits += 1
        self.arrivals.set(str(rank()), str(self.waits))
        done = threading.Event()
        threading.Thread(target=self._watch, args=(self.waits, work, done), name="waiting", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _watch(self, number: int, work: str, done: threading.Event) -> None:
        seconds = 0.0
        while not done.wait(NOTICE):
            seconds += NOTICE
            with contextlib.suppress(RuntimeError):  # the store is gone with its process; the exchange says so
                late = [str(r) for r in range(world_size()) if int(self.arrivals.get(str(r))) < number]
                if late:
                    names = ", ".join(late)
                    _log.warning("process %d has waited %g s for process %s (%s)", rank(), seconds, names, work)


_patient: _Patient | None = None
_log = logging.getLogger("aurora.distributed")


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def several() -> bool:
    """Whether this process is one of several, also before they have met and after they have parted."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def barrier(work: str) -> None:
    """Wait for all processes, without limit, however much longer theirs takes.

    Args:
        work: what lies behind this process and before those that it waits for ("evaluation"), for the message.
    """
    if _patient is not None:
        with _patient.waiting(work):
            dist.barrier(_patient.group)


def gather(value: T, work: str = "a step") -> list[T]:
    """`value` of every process, in order of rank, on every process (small picklable values); waits as `barrier`."""
    if _patient is None:
        return [value]
    values: list[Any] = [None] * world_size()
    with _patient.waiting(work):
        dist.all_gather_object(values, value, _patient.group)
    return values


def all_true(flag: bool) -> bool:
    """Whether `flag` is True in every process; cheap enough for every token that is drawn."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def from_main(value: T, work: str) -> T:
    """The main process's `value` on every process; waits as `barrier`."""
    box: list[Any] = [value]
    if _patient is not None:
        with _patient.waiting(work):
            dist.broadcast_object_list(box, src=0, group=_patient.group)
    return box[0]


def lost_process(error: BaseException) -> bool:
    """Whether an error of an exchange means that another process is gone."""
    return several() and isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def stop() -> None:
    """Leave the process group once every process has come this far, and write out what is buffered."""
    if dist.is_initialized():
        barrier("the end of its work")
        global _patient
        _patient = None
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def leave(status: int) -> None:
    """End this process at once, whatever its threads are doing, and its decoding processes."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a file on a full disk
                stream.flush()
    finally:
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
