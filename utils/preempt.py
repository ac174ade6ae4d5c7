"""SIGTERM, as a scheduler sends it before it takes a machine: the step is finished, saved, and the run ends with 0."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from types import FrameType

from utils import distributed
from utils.errors import tell

TOO_LATE = 75
"""Exit status when the time was over before the run had saved (EX_TEMPFAIL: start it again)."""
_log = logging.getLogger("aurora.preempt")


class Preemption:
    """Notes SIGTERM for the life of a run; before `begin`, while a run is loaded, it ends at once with 0.

    A thread keeps the time, woken by Python's own C handler of signals (`signal.set_wakeup_fd`): a handler in Python
    would not run while the main thread waits inside a collective for a process that is lost.

    Args:
        grace_seconds: from the signal to the end, whatever is going on; a run that has not saved by then ends with
            TOO_LATE and continues later from the checkpoint before.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds, self.asked, self._begun = grace_seconds, False, False
        self._before = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._wakes, self._woken = socket.socketpair()
        self._wakes.setblocking(False)
        self._before = signal.signal(signal.SIGTERM, self._note)
        self._fd_before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._keep_time, name="preemption", daemon=True)
        self._thread.start()

    def begin(self) -> bool:
        """From now on there is something to save; returns whether to stop nevertheless. All processes call it."""
        asked = self.agreed()
        self._begun = True
        return asked

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call it, so that all stop after the same step."""
        return not distributed.all_true(not self.asked)

    def close(self) -> None:
        """Put the earlier handler back."""
        if self._before is None:
            return
        signal.signal(signal.SIGTERM, self._before)
        signal.set_wakeup_fd(self._fd_before)
        self._before = None
        self._wakes.shutdown(socket.SHUT_RDWR)  # ends the thread; close would not, as forked workers hold it too
        self._wakes.close()
        self._thread.join()
        self._woken.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Lets the main thread go on; it asks `agreed` after its step."""
        self.asked = True

    def _keep_time(self) -> None:
        while signal.SIGTERM not in (received := self._woken.recv(64)):
            if not received:
                return
        self.asked = True
        if not self._begun:
            _log.warning("SIGTERM before the first step: nothing to save")
            distributed.leave(0)
        _log.warning("SIGTERM: saving after this step, at most %g s", self.grace_seconds)
        if not self._closed_within(self.grace_seconds):
            self._end()

    def _closed_within(self, seconds: float) -> bool:
        """Whether `close` is called in time; further signals change nothing."""
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                self._woken.settimeout(min(left, threading.TIMEOUT_MAX))
                if not self._woken.recv(64):
                    return True
        except TimeoutError:
            pass
        return False

    def _end(self) -> None:
        tell(
            f"error: {self.grace_seconds:g} s after SIGTERM the run had not saved; the newest complete checkpoint is "
            "intact. Remedy: raise log.grace_seconds and the scheduler's notice, or shorten a step "
            "(engine.accumulation)."
        )
        distributed.leave(TOO_LATE)
