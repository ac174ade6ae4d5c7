"""The typed errors a user can meet, and how a command ends on them: a cause, a remedy, and never a hang.

Each message names the field or file, its value, the rule and the remedy. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Numbers of the errors of a disk that is full, read-only or broken."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "remote process",
        "Socket Timeout", "Timed out waiting", "NCCL communicator was aborted", "failed to recv, got 0 bytes",
        "failed to connect")  # fmt: skip
"""What gloo, NCCL and the store say when another process is gone."""


class AuroraError(Exception):
    """Base of all errors that a user can repair; entry points print them without a traceback."""


class DataError(AuroraError):
    """A file of the data set is missing, broken or contradicts another one."""


class WeightsError(AuroraError):
    """A weight file does not fit the model it is loaded into."""


class CheckpointError(AuroraError):
    """A training checkpoint is damaged, incomplete or belongs to another run."""


class NonFiniteError(AuroraError):
    """A loss or gradient norm is NaN or infinite; the message names the step and the samples."""


@dataclass(frozen=True)
class Problem:
    """One broken rule of a configuration."""

    field: str
    """Dotted path, e.g. `optim.lr`; several fields of one rule are joined by " + "."""
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.rule}. Remedy: {self.remedy}."


class ConfigError(AuroraError):
    """All problems of one configuration at once.

    Args:
        problems: every broken rule, in order of discovery (at least one).
        source: the YAML file or other origin, named in the message.
    """

    def __init__(self, problems: list[Problem], source: str = "configuration") -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


def plain(error: AuroraError) -> str:
    """The message without the traceback that a loader's worker process puts before it."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2].strip()


def tell(text: str) -> None:
    """Print to stderr; where it is a file on a full disk the text is lost, and nothing else happens."""
    with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):  # beside a bar, not behind it
        print(text, file=sys.stderr, flush=True)


def several() -> bool:
    """Whether this process is one of several, also before they have met and after they have parted."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def lost_process(error: BaseException) -> bool:
    """Whether an error of an exchange means that another process is gone."""
    return several() and isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


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


def run_command(
    action: Callable[[], object],
    intact: str = "what is finished stays on the disk",
    memory: Callable[[], str] = str,
    failed: int = 1,
) -> int:
    """Run a command to its end; returns its exit status: what `action` returns, where that is a number, else 0.

    Errors that a user can repair are printed without a traceback. Of several processes, one that fails ends at once:
    the interpreter's orderly end may wait inside NCCL for the others, which wait for this one, and the launcher would
    not learn of it. So does one that is done: threads that gloo has not joined by then abort the process now and then
    ("terminate called without an active exception"), and the launcher would take a finished run for a failed one.

    Args:
        action: the command.
        intact: what is safe after an error of the machine, for the message: "the last checkpoint is intact, and ...".
        memory: what to do when the GPU's memory is exhausted, see `distributed.memory_advice`.
        failed: exit status after an error.
    """
    status = failed
    try:
        result = action()
        status = result if isinstance(result, int) else 0
    except AuroraError as error:
        tell(f"error: {plain(error)}")
    except (OSError, RuntimeError) as error:
        text = explained(error, intact, memory)
        if text is None:
            raise
        tell(f"error: {text}")
    finally:
        if several():
            if not isinstance(sys.exc_info()[1], SystemExit | None):
                tell(traceback.format_exc())
            leave(status)
    return status


def explained(error: OSError | RuntimeError, intact: str, memory: Callable[[], str]) -> str | None:
    """A full disk, a lost process or too little GPU memory in words; None for any other error."""
    reason = (str(error).splitlines() or [""])[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module must not import
        return f"{reason} {memory()} {intact[0].upper()}{intact[1:]}."
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error}. Remedy: free space, or correct the rights of that folder; {intact}."
    if lost_process(error):
        return f"another process of this run was lost, see its message or the launcher's ({reason}); {intact}."
    if "DataLoader worker" in str(error):
        return f"a decoding process was lost: {reason} Remedy: lower data.num_workers if memory is short; {intact}."
    return None
