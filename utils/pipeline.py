"""A list of commands run in order, each printed before it runs and skipped once it is done.

A step is done when its stamp holds the hash of all it depends on (command, configs, code, weights, earlier steps) and
its output exists. A step that was interrupted under the same hash is started again in its folder, where the commands
themselves continue; under another hash its folder is removed first, so that nothing old is mixed into the new.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from utils.errors import AuroraError
from utils.parent import end_with_parent
from utils.results import write_bytes, write_json


class StepError(AuroraError):
    """A command of the pipeline failed."""


@dataclass(frozen=True)
class Step:
    """One command and what it leaves."""

    name: str
    command: tuple[str, ...]
    """A script and its arguments, run by python or, in several processes, by torchrun."""
    folder: Path
    """Written by this step alone; removed before a start under another hash than the last."""
    output: Path
    """Exists once the command is done."""
    sources: tuple[str, ...]
    """Glob patterns, relative to the project, of all files that the result depends on."""
    needs: tuple[str, ...] = ()
    """Names of earlier steps."""
    settings: str = ""
    """The command's resolved configuration, as text."""
    parallel: bool = False
    """Whether it runs in as many processes as the pipeline has."""
    processes: int | None = None
    """A number of its own instead; the result must not depend on it, for it is no part of the hash."""
    alone: bool = False
    """Whether it is to have the machine for itself where steps run beside each other (`utils.schedule`)."""
    leading: bool = False
    """Whether it begins before all others that may begin, and uses any core; others beside it fill what it leaves."""
    stamps: Path | None = None
    """Where its stamp is kept: None = with the pipeline; elsewhere if several pipelines share its output."""


class Pipeline:
    """Runs steps below `folder`; stamps and times are kept in `folder/steps`.

    Args:
        root: the project, in which the commands run.
        folder: of the stamps.
        processes: of a step that is `parallel`.
        lock: keeps a second run (or a command that outlived its parent) from writing the same files.
        cores: the commands run on these alone; None = wherever this process may.
        quiet: whether a command's output is shown when it has ended; it is in `folder/steps/<name>.log` meanwhile.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        processes: int,
        lock: IO[str],
        cores: frozenset[int] | None = None,
        quiet: bool = False,
    ) -> None:
        self.root, self.stamps, self.processes, self.lock = root, folder / "steps", processes, lock
        self.cores, self.quiet = cores, quiet
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.hashes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.spans: dict[str, tuple[float, float]] = {}
        """Step -> when it began and ended, seconds since 1970."""

    def sharing(self, other: Pipeline) -> Pipeline:
        """This one, with what the other knows of finished steps."""
        self.hashes, self.seconds, self.spans = other.hashes, other.seconds, other.spans
        return self

    def run(self, step: Step) -> None:
        """Run a step unless it is done.

        Raises:
            StepError: the command ended with another status than 0, or left no output.
        """
        if self.is_done(step):
            say(f"== {step.name}: done before in {self.seconds[step.name]:.0f} s")
            return
        digest = self.hashes[step.name]
        stamps = step.stamps or self.stamps
        done, begun = stamps / f"{step.name}.json", stamps / f"{step.name}.begun"
        if begun.is_file() and begun.read_text() != digest:
            shutil.rmtree(self.root / step.folder, ignore_errors=True)
        write_bytes(begun, digest.encode())
        command = self._launched(step)
        say(f"== {step.name}: {shlex.join(command)}")
        began, start = time.time(), time.monotonic()
        status = self._call(command, stamps / f"{step.name}.log")
        seconds = time.monotonic() - start
        if status != 0 or not self._output(step).exists():
            reason = f"ended with status {status}" if status else f"left no {step.output}"
            raise StepError(f"step {step.name} {reason}: {shlex.join(command)}. Remedy: see its message above.")
        write_json(done, {"hash": digest, "seconds": seconds, "began": began, "command": command})
        self.seconds[step.name], self.spans[step.name] = seconds, (began, began + seconds)

    def is_done(self, step: Step) -> bool:
        """Whether a step need not run; asked of all steps before it, as its hash holds theirs. Notes its seconds."""
        self.hashes[step.name] = digest = self._digest(step)
        path = (step.stamps or self.stamps) / f"{step.name}.json"
        stamp = json.loads(path.read_text()) if path.is_file() else {}
        done = bool(stamp) and stamp["hash"] == digest and self._output(step).exists()
        if done:
            seconds = stamp["seconds"]
            began = stamp.get("began", path.stat().st_mtime - seconds)
            self.seconds[step.name], self.spans[step.name] = seconds, (began, began + seconds)
        return done

    def _output(self, step: Step) -> Path:
        return self.root / step.output

    def _launched(self, step: Step) -> tuple[str, ...]:
        """The command line; the launcher is no part of a step's hash.

        torchrun, because it ends its processes when it is terminated. The command `deepspeed` does not pass SIGTERM on
        to the launcher that it starts (deepspeed/launcher/runner.py), whose processes would train on, unseen.
        """
        processes = step.processes or (self.processes if step.parallel else 1)
        if processes == 1:
            return ("python", *step.command)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        return ("python", *launcher, *step.command)

    def _call(self, command: Sequence[str], log: Path) -> int:
        """Run a command with this interpreter's `bin` first in PATH; it ends with this process."""
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        # torchrun would set the same by itself, with six lines about it on the terminal.
        threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
        with open(log, "wb") if self.quiet else nullcontext() as kept:
            self.child = subprocess.Popen(
                command,
                cwd=self.root,
                env={**threads, **os.environ, "PATH": path},
                stdout=kept,
                stderr=kept,
                pass_fds=(self.lock.fileno(),),
                preexec_fn=partial(_prepare_child, self.cores),
            )
            try:
                if self.stopped:  # while the command was being started
                    self.child.terminate()
                return self.child.wait()
            except BaseException:
                self.stop()
                raise
            finally:
                if self.quiet:
                    say(log.read_text(encoding="utf-8", errors="replace"), end="")

    def stop(self) -> None:
        """End the command that is running, if any, and wait for it."""
        self.stopped = True
        if self.child is not None:
            self.child.terminate()
            self.child.wait()

    def _digest(self, step: Step) -> str:
        earlier = [self.hashes[name] for name in step.needs]
        digest = hashlib.sha256(json.dumps([step.command, step.settings, earlier]).encode())
        for path in _files(self.root, step.sources):
            digest.update(f"{path.relative_to(self.root)}\0".encode() + path.read_bytes() + b"\0")
        return digest.hexdigest()


@contextmanager
def locked(path: Path, patience: float = 20.0) -> Iterator[IO[str]]:
    """Hold a file lock; waits a moment for a process that is about to end.

    Raises:
        StepError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StepError(
                        f"{path.parent}: another run is writing there. Remedy: wait for it, or choose another --out."
                    ) from None
                time.sleep(0.5)
        yield file


def say(text: str, end: str = "\n") -> None:
    """Print from the start of a line: on a terminal, the progress bar of a command that runs beside may stand there."""
    print("\r\x1b[K" * sys.stdout.isatty() + text, end=end, flush=True)


def _files(root: Path, patterns: Iterable[str]) -> list[Path]:
    """Every file once, in order of its path."""
    return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})


def _prepare_child(cores: frozenset[int] | None) -> None:
    """Ask Linux to terminate this process when its parent dies, however that happens, and keep to some cores."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    end_with_parent()
