"""How a command that trains or evaluates ends when something goes wrong: a cause, a remedy, and never a hang."""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from utils.distributed import leave, lost_process, several, world_size
from utils.errors import AuroraError, plain, tell

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Numbers of the errors of a disk that is full, read-only or broken."""


def run_command(action: Callable[[], object], intact: str, memory: Callable[[], str]) -> int:
    """Run a command to its end; returns its exit status.

    Errors that a user can repair are printed without a traceback. Of several processes, one that fails ends at once:
    the interpreter's orderly end may wait inside NCCL for the others, which wait for this one, and the launcher would
    not learn of it. So does one that is done: threads that gloo has not joined by then abort the process now and then
    ("terminate called without an active exception"), and the launcher would take a finished run for a failed one.

    Args:
        action: the command.
        intact: what is safe, for the message: "the last checkpoint is intact, and ...".
        memory: what to do when the GPU's memory is exhausted, see `memory_advice`.
    """
    status = 1
    try:
        action()
        status = 0
    except AuroraError as error:
        tell(f"error: {plain(error)}")
    except (OSError, RuntimeError) as error:
        text = explained(error, intact, memory)
        if text is None:
            raise
        tell(f"error: {text}")
    finally:
        if status and world_size() > 1:
            if not isinstance(sys.exc_info()[1], SystemExit | None):
                tell(traceback.format_exc())
            leave(status)
    if not status and several():
        leave(status)
    return status


def explained(error: OSError | RuntimeError, intact: str, memory: Callable[[], str]) -> str | None:
    """A full disk, a lost process or too little GPU memory in words; None for any other error."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{reason} {memory()} {intact[0].upper()}{intact[1:]}."
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error}. Remedy: free space, or correct the rights of that folder; {intact}."
    if lost_process(error):
        return f"another process of this run was lost, see its message or the launcher's ({reason}); {intact}."
    if "DataLoader worker" in str(error):
        return f"a decoding process was lost: {reason} Remedy: lower data.num_workers if memory is short; {intact}."
    return None


def memory_advice(config: str, overrides: Sequence[str]) -> str:
    """The command that says what fills the GPU of this run, and the cheapest change; nothing is planned in the run."""
    card = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 48.0
    options = ["--gpus", os.environ.get("WORLD_SIZE", "1"), "--gpu-gb", f"{card:.1f}", "--exhausted"]
    command = ["python", "scripts/plan_memory.py", *options, "--config", config, *overrides]
    return f"Remedy: the cheapest change, which this command names: {shlex.join(command)}."
