"""Read a checkpoint folder tensor by tensor: safetensors or torch files, single or sharded; refuses what is broken."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_SAFE, INDEX_SAFE = "model.safetensors", "model.safetensors.index.json"
SINGLE_BIN, INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"

DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
    struct.error,
)  # fmt: skip
"""What torch's safe unpickler raises on bytes that are no pickle of tensors (found by feeding it mutated files)."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class Checkpoint:
    """Names, shapes and lazily read tensors of a checkpoint folder. Use as a context manager.

    Looks for, in this order, `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    `pytorch_model.bin.index.json`. Torch files are read with `weights_only=True`: a pickle that would run code is
    refused.

    Raises:
        CheckpointError: no such file, a missing or damaged shard, a shard that contradicts the index.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.files, index = _find_files(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._source: dict[str, dict[str, Tensor] | safe_open] = {}
        self._stack = ExitStack()
        for path in self.files:
            self._open(path)
        for name, file in index.items():
            if name not in self.shapes:
                raise CheckpointError(f"{self.folder / file}: lacks tensor {name!r}, which the index says it holds")

    def _open(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            try:
                source = self._stack.enter_context(safe_open(path, framework="pt", device=str(self.device)))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged or truncated safetensors file ({error})") from error
            shapes = {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
        else:
            source = _load_torch_file(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        twice = sorted(shapes.keys() & self.shapes.keys())
        if twice:
            raise CheckpointError(f"{path}: holds {twice[0]!r}, which another shard holds as well")
        self.shapes |= shapes
        self._source |= dict.fromkeys(shapes, source)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str) -> Tensor:
        """The tensor `name`, on the device, in its stored dtype."""
        source = self._source[name]
        if isinstance(source, dict):
            return source[name].to(self.device)
        return source.get_tensor(name)


def _find_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The shard files of a folder and the index (empty for a single file)."""
    for single, index_name in ((SINGLE_SAFE, INDEX_SAFE), (SINGLE_BIN, INDEX_BIN)):
        if (folder / single).is_file():
            return [folder / single], {}
        if (folder / index_name).is_file():
            index = _read_index(folder / index_name)
            names = sorted(set(index.values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder / missing[0]}: shard missing ({len(missing)} of {len(names)} named by "
                                      f"{index_name} are not there: {', '.join(missing)})")  # fmt: skip
            return [folder / name for name in names], index
    names = ", ".join((SINGLE_SAFE, INDEX_SAFE, SINGLE_BIN, INDEX_BIN))
    raise CheckpointError(f"{folder}: no weights; one of {names} is needed")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        bad = [file for file in index.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a shard index with a weight_map ({error!r})") from error
    if bad or not index:
        raise CheckpointError(f"{path}: weight_map must name files of the same folder, got {bad[:3]}")
    return index


def _load_torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict from a torch file, memory-mapped where its format allows."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    if starts_as_zip and not is_zip:
        raise CheckpointError(f"{path}: truncated torch file (its directory at the end is missing)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because the file is damaged or holds more than tensors (loading such a pickle could run "
            f"code): {str(error).splitlines()[0]}"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path}: damaged or truncated torch file ({error!r})") from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path}: not a state dict (a flat mapping of names to tensors is needed)")
    return state
