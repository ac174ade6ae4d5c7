"""How far a command is: a bar where a person watches, now and then a line of its own in a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from utils.errors import tell

T = TypeVar("T")

BAR = " |{bar:20}| {elapsed} gone, {remaining} left{postfix}"
BETWEEN_LINES = 30.0
"""Least seconds between two lines in a file."""


class Progress:
    """Counts finished units on stderr.

    Args:
        name: of what is being done, in front of the bar.
        total: units in all.
        unit: what is counted, in the plural.
        done: units finished before.
        hidden: whether nothing is shown (all processes but one).
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, hidden: bool = False) -> None:
        self.name, self.total, self.unit, self.first, self.done = name, total, unit, done, done
        self.note = ""
        """Shown behind the times from the next update on."""
        self.began = self.told = time.monotonic()
        # Some pseudo-terminals (of containers, of CI) say that they are 0 columns wide, where tqdm draws nothing.
        terminal = sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
        self.writes_lines = not hidden and not terminal
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format=f"{{desc}} {{n_fmt}}/{{total_fmt}} {unit}" + BAR,
            disable=hidden or not terminal,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Add finished units."""
        self.done += count
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.writes_lines and now - self.told >= BETWEEN_LINES:
            self.told, gone = now, now - self.began
            left = gone / max(1, self.done - self.first) * (self.total - self.done)
            times = f"{tqdm.format_interval(gone)} gone, {tqdm.format_interval(left)} left"
            parts = (f"{self.name} {self.done}/{self.total} {self.unit}", times, self.note)
            tell(", ".join(part for part in parts if part))

    def close(self) -> None:
        """Leave the bar as it stands, on a line of its own."""
        self.bar.close()


def counted(items: Iterable[T], total: int, name: str, unit: str) -> Iterator[T]:
    """The items, counted as they come."""
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
