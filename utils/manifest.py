"""Is a checkpoint folder what was written? Size and SHA-256 of every file, taken while it was written."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from utils.errors import CheckpointError

FIELDS = {"step": int, "samples": int, "world_size": int, "trainable": list, "files": dict}
"""What every manifest holds."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON or without one of FIELDS.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({error}). Remedy: use another checkpoint.") from None
    wrong = [n for n, kind in FIELDS.items() if not (isinstance(manifest, dict) and isinstance(manifest.get(n), kind))]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} is missing or of another type. Remedy: use another checkpoint.")
    odd = [name for name, facts in manifest["files"].items() if not _is_entry(name, facts)]
    if odd or not manifest["files"]:
        raise CheckpointError(f"{path}: files holds no size and hash of {odd[:1]}. Remedy: use another checkpoint.")
    return manifest


def _is_entry(name: str, facts: Any) -> bool:
    """Whether a file of a manifest has a size and a hash, and lies in the folder."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(facts, list) and [type(fact) for fact in facts] == [int, str]


def save_hashed(state: Any, path: Path) -> list[Any]:
    """`torch.save` that hashes what it writes, so that nothing has to be read back; returns size and hash.

    The file is on the disk when this returns. What the disk made of it shows when it is loaded (`damage`).

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        stream = _HashedStream(file, pool)
        torch.save(state, stream)
        file.flush()
        os.fsync(file.fileno())
        return [file.tell(), stream.digest.hexdigest()]


class _HashedStream:
    """A file of torch.save; the hash is computed in another thread while the system takes the bytes."""

    def __init__(self, file: IO[bytes], pool: ThreadPoolExecutor) -> None:
        self.file, self.pool, self.digest, self.flush = file, pool, hashlib.sha256(), file.flush

    def write(self, data: Any) -> int:
        """As of any file."""
        hashed = self.pool.submit(self.digest.update, data)
        try:
            return self.file.write(data)
        finally:
            hashed.result()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        expected = read_manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if file_digest(path) != digest:
                return f"{name} has another content than when it was written"
        except (OSError, ValueError) as error:  # a broken disk; a name with a null character
            return f"{name} cannot be read ({error})"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
