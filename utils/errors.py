"""The typed errors a user can meet; each message names the field or file, its value, the rule and the remedy."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

from tqdm import tqdm


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
