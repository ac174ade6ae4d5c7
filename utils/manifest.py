"""Is a checkpoint folder what was written? Size and SHA-256 of every file, and the checksums in torch's archives."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

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


def describe(folder: Path) -> dict[str, list[Any]]:
    """Size and hash of every file below `folder`, by relative name, as the disk holds them.

    Each file is flushed and dropped from the page cache first, where the system allows it, so that what is read comes
    from the disk. Torch's archives hold checksums that were made of the tensors in memory: those are compared.

    Raises:
        OSError: a file cannot be flushed or read, or is not what was in memory.
    """
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if path.suffix == ".pt":
            _compare_checksums(path)
        found[str(path.relative_to(folder))] = [path.stat().st_size, file_digest(path)]
    return found


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


def _compare_checksums(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"{path.name} is no complete archive ({error})") from None
    if wrong is not None:
        raise OSError(f"{path.name}: {wrong} is not on disk as it was in memory")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
