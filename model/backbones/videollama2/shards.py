"""Read a checkpoint folder tensor by tensor: safetensors or torch files, single or sharded; refuses what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.tensor_files import TensorFileError, load_state

SINGLE_SAFE, INDEX_SAFE = "model.safetensors", "model.safetensors.index.json"
SINGLE_BIN, INDEX_BIN = "pytorch_model.bin", "pytorch_model.bin.index.json"

class Checkpoint:
    """Names, shapes and lazily read tensors of a checkpoint folder. Use as a context manager.

    Looks for, in this order, `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    `pytorch_model.bin.index.json`. Torch files are read with `weights_only=True`: a pickle that would run code is
    refused.

    Raises:
        TensorFileError: no such file, a missing or damaged shard, a shard that contradicts the index.
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
                raise TensorFileError(f"{self.folder / file}: lacks tensor {name!r}, which the index says it holds")

    def _open(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            try:
                source = self._stack.enter_context(safe_open(path, framework="pt", device=str(self.device)))
            except (SafetensorError, OSError) as error:
                raise TensorFileError(f"{path}: damaged or truncated safetensors file ({error}). "
                                      "Remedy: download it again.") from error
            shapes = {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
        else:
            source = load_state(path)
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        twice = sorted(shapes.keys() & self.shapes.keys())
        if twice:
            raise TensorFileError(f"{path}: holds {twice[0]!r}, which another shard holds as well")
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
                raise TensorFileError(
                    f"{folder / missing[0]}: shard missing ({len(missing)} of {len(names)} named by {index_name} are "
                    f"not there: {', '.join(missing)}). Remedy: download the missing shards."
                )
            return [folder / name for name in names], index
    names = ", ".join((SINGLE_SAFE, INDEX_SAFE, SINGLE_BIN, INDEX_BIN))
    raise TensorFileError(f"{folder}: no weights; one of {names} is needed")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        bad = [file for file in index.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path}: not a shard index with a weight_map ({error!r})") from error
    if bad or not index:
        raise TensorFileError(f"{path}: weight_map must name files of the same folder, got {bad[:3]}")
    return index
