"""Files that are whole or not there, one writer per folder, and hashes of content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from utils.errors import AuroraError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under a temporary name in the same folder, flushed to the disk, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON; refuses NaN and infinity (ValueError)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """`write_bytes` of one JSON object per line."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records))


def hash_files(paths: Iterable[Path], names: bool = True) -> str:
    """SHA-256, in hexadecimal digits, over the contents of files in order of their names, and over the names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        if names:
            digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    return hash_files([path], names=False)


def lock(path: Path, patience: float = 20.0) -> IO[str]:
    """Hold `path` until the returned file is closed, or the process and its children that inherited it have ended.

    Args:
        path: of the lock's file, which holds the number of the process.
        patience: seconds to wait for a process that is about to end (the rest of a run that was killed).

    Raises:
        AuroraError: another process holds it.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, deadline = path.open("a+", encoding="utf-8"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise AuroraError(
                    f"{path}: process {file.read().strip()} is writing there. Remedy: wait for it, stop it, or choose "
                    "another folder."
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
