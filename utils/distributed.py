"""Processes of a run: start, exchange of small values, orderly end; under `deepspeed`, `torchrun` or plain python."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.ds import deepspeed
from utils.parent import end_with_launcher

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process (evaluation and saving of a 7B model included)."""
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
    return device


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


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """`value` of every process, in order of rank, on every process (small picklable values)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_true(flag: bool) -> bool:
    """Whether `flag` is True in every process; cheap enough for every token that is drawn."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def from_main(value: T) -> T:
    """The main process's `value` on every process."""
    box: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def lost_process(error: BaseException) -> bool:
    """Whether an error of an exchange means that another process is gone."""
    return several() and isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def stop() -> None:
    """Leave the process group once every process has come this far, and write out what is buffered."""
    if dist.is_initialized():
        barrier()
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
