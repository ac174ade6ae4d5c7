"""One interface to whoever writes text about a clip: a web service, a local model, or the mini world itself.

A backend turns requests into replies or raises one of the errors below; it never retries, waits or writes. All of that
is done once, in `dataset.annotate.engine`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dataset.media import frame_indexes, list_images
from dataset.refavs import RefAvsIndex, Row
from utils.errors import AuroraError, DataError


@dataclass(frozen=True)
class Request:
    """A prompt with the media it speaks of."""

    row: Row
    prompt: str
    frames: tuple[Path, ...]
    """Image files in order of time (JPEG or PNG, as they lie in the data set)."""
    audio: Path
    wrong: str = ""
    """The path that is to be corrected or judged; "" for the writer."""
    attempt: int = 0
    """How often this row's reply was refused by the gates before."""


@dataclass(frozen=True)
class Reply:
    """Text, and what it cost in tokens as the service counted them (0 for local backends)."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Backend(Protocol):
    """Whoever answers."""

    name: str
    """Names backend and model in the files."""
    remote: bool
    """Whether media leave this machine: such a backend is never asked without --send."""
    batch_size: int
    """Requests answered in one call; 1 for services, which are called from several threads instead."""

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in order (at most `batch_size` requests)."""
        ...


class Transient(AuroraError):
    """The service could not answer now (429, 5xx, timeout, cut connection, no JSON): worth another try.

    Args:
        message: what happened, without secrets.
        wait: seconds the service asked to wait, or None.
        billed: whether the request may have been computed and charged though no answer arrived.
    """

    def __init__(self, message: str, wait: float | None = None, billed: bool = False) -> None:
        super().__init__(message)
        self.wait, self.billed = wait, billed


class Blocked(AuroraError):
    """The service refuses this row (safety filter); asking again would change nothing."""


class Rejected(AuroraError):
    """The service refuses the run: wrong key, unknown model, spent quota. The run stops."""


def choose_frames(index: RefAvsIndex, clip: str, positions: Sequence[int] | int) -> tuple[Path, ...]:
    """Image files of a clip.

    Args:
        index: says where media lie.
        clip: folder name.
        positions: 0-based seconds (frame t shows second t+1 of the video), or how many evenly spaced frames.

    Raises:
        DataError: the clip has fewer frames than asked for.
    """
    paths = list_images(index.frames_folder(clip))
    if isinstance(positions, int):
        return tuple(paths[i] for i in frame_indexes(len(paths), min(positions, len(paths))))
    if max(positions) >= len(paths):
        raise DataError(f"{index.frames_folder(clip)}: {len(paths)} frames, but frame {max(positions)} is asked for. "
                        "Remedy: restore the clip.")  # fmt: skip
    return tuple(paths[i] for i in positions)


def image_type(path: Path) -> str:
    """MIME type of an image file."""
    return "image/png" if path.suffix.lower() == ".png" else "image/jpeg"


def encoded(path: Path) -> str:
    """A file's bytes in base64.

    Raises:
        DataError: the file cannot be read.
    """
    return base64.b64encode(file_bytes(path)).decode("ascii")


def file_bytes(path: Path) -> bytes:
    """A media file as it lies on disk.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Remedy: restore the clip.") from error


def redacted(text: str, *secrets: str | None) -> str:
    """`text` without the secrets, at most 300 characters, in one line."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "<key>")
    return " ".join(text.split())[:300]
