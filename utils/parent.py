"""A process that ends with the one that started it, however that one ends (Linux alone)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun and DeepSpeed's launcher set for the processes that they start."""


def end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """`end_with_parent` where the parent is a launcher: its processes would train on, unseen, when it is killed.

    Not for other parents, such as a shell that a run outlives by intention.
    """
    if any(name in os.environ for name in LAUNCHERS):
        end_with_parent()
