"""Processes of a run, under `deepspeed`, `torchrun` or plain python: start, exchange of small values, stop, seeds."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from utils.ds import deepspeed

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Longest wait inside a step, where all processes do the same work."""
UNLIMITED = timedelta(days=365)
"""Of the waits after unequal work (evaluation, mining, saving): gloo has no word for "no limit"."""
NOTICE = 60.0
"""Seconds of waiting after which a process says for whom, and again every so often."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun and DeepSpeed's launcher set for the processes that they start."""
_log = logging.getLogger("aurora.distributed")


def start(threads: int | None = None) -> torch.device:
    """Join the process group (a group of one without a launcher) and return this process's device.

    Args:
        threads: CPU threads of this process; None = cores / processes on this machine.
    """
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


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


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


def from_main(value: T, work: str) -> T:
    """The main process's `value` on every process; waits as `barrier`."""
    box: list[Any] = [value]
    if _patient is not None:
        with _patient.waiting(work):
            dist.broadcast_object_list(box, src=0, group=_patient.group)
    return box[0]


def all_true(flag: bool) -> bool:
    """Whether `flag` is True in every process; cheap enough for every token that is drawn."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def stop() -> None:
    """Leave the process group once every process has come this far, and write out what is buffered."""
    if dist.is_initialized():
        barrier("the end of its work")
        global _patient
        _patient = None
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


class StopSignal:
    """Notes SIGTERM, as a scheduler sends it before it takes a machine: the step is finished and saved, the run ends.

    A launcher that was killed counts as a signal too, for the processes that it started would train on, unseen.

    Args:
        grace_seconds: from the signal to the end: Linux ends a run that has not been saved by then (SIGALRM), and it
            continues later from the checkpoint before.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds, self.asked, self.launcher = grace_seconds, False, os.getppid()
        self.launched = any(name in os.environ for name in LAUNCHERS)
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def requested(self) -> bool:
        """Whether any process is to stop; all processes call it, so that all stop after the same step."""
        orphaned = self.launched and os.getppid() != self.launcher
        return not all_true(not (self.asked or orphaned))

    def close(self) -> None:
        """Put the earlier handler back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _note(self, *_: object) -> None:
        if not self.asked:  # SIGALRM has no handler of Python's, which would wait for a collective to return
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
        self.asked = True


def seed_everything(seed: int, number: int = 0) -> None:
    """Seed python, numpy and torch (all devices); each process draws its own numbers by its `number`."""
    random.seed(seed + number)
    np.random.seed((seed + number) % 2**32)
    torch.manual_seed(seed + number)


def rng_state() -> dict[str, Any]:
    """State of every generator, as plain values and tensors (loads with `torch.load(weights_only=True)`)."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave. A CUDA state is skipped on a machine without CUDA, and the other way round."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def memory_advice(config: str, overrides: Sequence[str]) -> str:
    """The command that says what fills the GPU of this run, and the cheapest change; nothing is planned in the run."""
    card = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 48.0
    options = ["--gpus", os.environ.get("WORLD_SIZE", "1"), "--gpu-gb", f"{card:.1f}", "--exhausted"]
    command = ["python", "scripts/plan_memory.py", *options, "--config", config, *overrides]
    return f"Remedy: the cheapest change, which this command names: {shlex.join(command)}."


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
