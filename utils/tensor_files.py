"""Files of tensors: read as tensors and nothing else (a pickle that would run code is refused), damage is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import WeightsError

DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
    struct.error,
)  # fmt: skip
"""What torch's safe unpickler raises on bytes that are no pickle of tensors (found by feeding it mutated files)."""


class TensorFileError(WeightsError, ValueError):
    """A weight file that cannot be used; the message names the file and what is wrong with it."""


def load_pickle(path: str | Path) -> Any:
    """What a torch file holds, memory-mapped where its format allows: tensors and plain containers only.

    Raises:
        TensorFileError: no such file, damaged, or refused because loading it could run code.
    """
    path = Path(path)
    try:
        is_zip = zipfile.is_zipfile(path)
        with path.open("rb") as file:
            starts_as_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise TensorFileError(f"{path}: cannot be opened ({error.strerror}). Remedy: correct the path.") from error
    if starts_as_zip and not is_zip:
        raise TensorFileError(f"{path}: truncated torch file (its directory at the end is missing). Remedy: download "
                              "it again and compare its size with the publisher's.")  # fmt: skip
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            f"{path}: refused, because the file is damaged or holds more than tensors (loading such a pickle could run "
            f"code): {_reason(error)}. Remedy: take the file from its publisher, as safetensors if there is a choice."
        ) from error
    except DAMAGE as error:
        raise TensorFileError(f"{path}: damaged or truncated torch file ({error!r})") from error


def load_state(path: str | Path) -> dict[str, Tensor]:
    """A flat state dict from a torch file; see `load_pickle`.

    Raises:
        TensorFileError: also where the file holds anything but names and tensors.
    """
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise TensorFileError(f"{path}: not a state dict (a flat mapping of names to tensors is needed)")
    return state


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        TensorFileError: missing, damaged or truncated.
    """
    try:
        with safe_open(path, framework="pt") as source:
            return {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise TensorFileError(f"{path}: missing, damaged or truncated safetensors file ({error})") from error


def save_safetensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a safetensors file with the permissions of any new file.

    safetensors itself (0.8) leaves files that their owner alone may read, which shuts the others out of weights and
    cached features in a folder that several people share. The path is written as it stands: callers that replace a
    file name a temporary one and rename it.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`save_safetensors` whole or not at all: under a temporary name, flushed to the disk, renamed.

    Args:
        path: of the file.
        tensors: on any device, none of which share memory.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_safetensors({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """An object from a JSON file that belongs to weights.

    Raises:
        TensorFileError: missing or not a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TensorFileError(f"{path}: cannot be read ({error.strerror}); a checkpoint folder needs it") from error
    except ValueError as error:
        raise TensorFileError(f"{path}: not a valid configuration file ({error})") from error
    if not isinstance(data, dict):
        raise TensorFileError(f"{path}: the top level must be an object")
    return data


def _reason(error: pickle.UnpicklingError) -> str:
    """The line of torch's message that names what the pickle asks for."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "global" in line.lower() or "GLOBAL" in line]
    return (named or lines or ["unknown"])[0].rstrip(".")
