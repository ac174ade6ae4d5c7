"""SIGTERM, as a scheduler sends it before it takes a machine: the step is finished, saved, and the run ends with 0."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType

from utils import distributed

TOO_LATE = 75
"""Exit status when the time was over before the run had saved (EX_TEMPFAIL: start it again)."""
_log = logging.getLogger("aurora.preempt")


class Preemption:
    """Notes SIGTERM for the life of a run.

    Args:
        grace_seconds: from the signal to the end, whatever is going on; a run that has not saved by then ends with
            TOO_LATE and continues later from the checkpoint before.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds, self.asked = grace_seconds, False
        self._timer: threading.Timer | None = None
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call it, so that all stop after the same step."""
        return not distributed.all_true(not self.asked)

    def close(self) -> None:
        """Put the earlier handler back."""
        if self._timer is not None:
            self._timer.cancel()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        _log.warning("SIGTERM: saving after this step, at most %g s", self.grace_seconds)
        self._timer = threading.Timer(self.grace_seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        print(
            f"error: {self.grace_seconds:g} s after SIGTERM the run had not saved; the checkpoint before is intact. "
            "Remedy: raise log.grace_seconds and the scheduler's notice, or shorten a step (engine.accumulation).",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TOO_LATE)
