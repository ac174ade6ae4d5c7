"""Released key names <-> ours, strict both ways.

The released checkpoint nests everything under `model.` and repeats BEATs' one relative-position table once per layer.
`names.RULES` is the whole mapping; anything it does not explain is an error, listed together with all others.

Not run but kept, so that a saved checkpoint holds the released names: SigLIP's last layer, its post_layernorm and
pooling head, and BEATs' AudioSet predictor. Only the last three may be absent on import (`names.UNUSED`; zeros
take their place), and only buffers of older transformers versions may be extra (`names.STALE_BUFFERS`; ignored).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import CONFIG_NAME, VideoLlama2Config
from model.backbones.videollama2.names import TABLE, KeyCheck, check_keys, from_released, moved_component, to_released
from model.backbones.videollama2.shards import INDEX_SAFE, SINGLE_SAFE, Checkpoint
from utils.tensor_files import TensorFileError, save_safetensors

OWN_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names that `save_backbone` gives, and may therefore replace or remove."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did beyond the one-to-one mapping."""

    files: tuple[str, ...]
    parameters: int
    """Values in the model (the shared table counted once)."""
    ignored: tuple[str, ...]
    """Stored names that were skipped (`STALE_BUFFERS`)."""
    zero_filled: tuple[str, ...]
    """Unused tensors that the checkpoint lacks (`UNUSED`)."""


def expected_keys(config: VideoLlama2Config) -> dict[str, tuple[int, ...]]:
    """Every released name with its shape, from a model on the meta device (allocates nothing)."""
    return _released_shapes(_empty_model(config, "sdpa"))


def load_backbone(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> tuple[VideoLlama2, LoadReport]:
    """Build the backbone of a folder with released names (config.json and safetensors or torch shards).

    Names and shapes are compared before any tensor is read; the model is built on the meta device and takes the read
    tensors over, so that no weight is held twice.

    Args:
        folder: checkpoint folder.
        dtype: of all weights; None keeps the stored dtypes.
        attention: "eager" or "sdpa".
        device: where the weights go.

    Returns:
        (model in eval mode, report).

    Raises:
        ValueError: config.json is missing or unsupported.
        TensorFileError: a file is missing, damaged or would run code; or names and shapes do not fit (all listed).
    """
    config = VideoLlama2Config.from_folder(folder)
    model = _empty_model(config, attention)
    expected = _released_shapes(model)
    with Checkpoint(folder, device) as checkpoint:
        ignored, absent = _compare(checkpoint, expected, Path(folder))
        state: dict[str, Tensor] = {}
        for name in checkpoint:
            if name in ignored:
                continue
            tensor = checkpoint.get(name)
            tensor = tensor if dtype is None else tensor.to(dtype)
            ours = from_released(name)
            if ours in state and not torch.equal(state[ours], tensor):
                raise TensorFileError(
                    f"{folder}: {name} differs from the copy under another layer; the position table must be shared"
                )
            state.setdefault(ours, tensor)
        for name in absent:
            state[from_released(name)] = torch.zeros(expected[name], dtype=dtype, device=device)
        files = tuple(path.name for path in checkpoint.files)
    model.load_state_dict(state, strict=True, assign=True)
    model.reset_buffers(device)
    count = sum(p.numel() for p in model.parameters())
    return model.eval(), LoadReport(files, count, tuple(ignored), tuple(absent))


def save_backbone(model: VideoLlama2, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Write config.json and safetensors shards under the released names; see `save_state`.

    Args:
        model: the plain backbone (adapters merged, parameters gathered).
    """
    return save_state(model.config, model.state_dict(), folder, max_shard_bytes)


def save_state(
    config: VideoLlama2Config, state: dict[str, Tensor], folder: str | Path, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write a backbone's state dict under the released names.

    Every file is written beside its place and then renamed, so a reader never sees half a file; files of an earlier
    save in the same folder that no longer belong are removed last.

    Args:
        config: sizes.
        state: our names, complete, without adapters.
        folder: made if needed.
        max_shard_bytes: largest shard; one file `model.safetensors` if everything fits.

    Returns:
        The written files.

    Raises:
        ValueError: if names or shapes are not exactly those of the config (all listed).
    """
    layers = config.beats.encoder_layers
    tensors = {released: tensor for name, tensor in state.items() for released in to_released(name, layers)}
    _compare(tensors, expected_keys(config), Path(folder), complete=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    names = [SINGLE_SAFE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for name, keys in zip(names, shards, strict=True):
        # clone where needed: safetensors refuses tensors that share memory, as the repeated table does
        shard = {k: tensors[k].detach().cpu().contiguous() for k in keys}
        shard = {k: x.clone() if from_released(k) == TABLE else x for k, x in shard.items()}
        _replace(folder / name, lambda path, shard=shard: save_safetensors(shard, path))
    if len(shards) > 1:
        total = sum(x.numel() * x.element_size() for x in tensors.values())
        weight_map = {k: name for name, keys in zip(names, shards, strict=True) for k in keys}
        names.append(INDEX_SAFE)
        _replace(folder / INDEX_SAFE, _json_writer({"metadata": {"total_size": total}, "weight_map": weight_map}))
    names.append(CONFIG_NAME)
    _replace(folder / CONFIG_NAME, _json_writer(config.to_dict()))
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_SAFE]:
        if OWN_FILES.fullmatch(stale.name) and stale.name not in names:
            stale.unlink(missing_ok=True)
    return [folder / name for name in names]


def _empty_model(config: VideoLlama2Config, attention: str) -> VideoLlama2:
    with torch.device("meta"):
        return VideoLlama2(config, attention)


def _released_shapes(model: VideoLlama2) -> dict[str, tuple[int, ...]]:
    return {
        released: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        for released in to_released(name, model.config.beats.encoder_layers)
    }


def _compare(
    found: Checkpoint | dict[str, Tensor], expected: dict[str, tuple[int, ...]], folder: Path, complete: bool = False
) -> tuple[list[str], list[str]]:
    """(stale names to ignore, unused names to fill with zeros); raises one TensorFileError that lists all faults."""
    shapes = found.shapes if isinstance(found, Checkpoint) else {k: tuple(x.shape) for k, x in found.items()}
    checks = check_keys(shapes, expected, complete)
    refuse(checks, folder)
    tolerated = [c for c in checks if c.status == "tolerated"]
    # A table stored under layer 0 alone needs no filling: its copies are the same parameter.
    absent = [c.name for c in tolerated if c.stored is None and from_released(c.name) != TABLE]
    return [c.name for c in tolerated if c.expected is None], absent


def refuse(checks: list[KeyCheck], folder: str | Path) -> None:
    """Raise one TensorFileError that lists every key that does not fit; nothing where all do."""
    faults = [check for check in checks if check.is_fault]
    if faults:
        hints = moved_component(checks)
        raise TensorFileError(
            "\n".join([f"{folder}: {len(faults)} keys do not fit the model that config.json describes:",
                       *(f"  {hint}" for hint in hints), *(f"  {fault}" for fault in faults)])
        )  # fmt: skip


def _split(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = []
    used = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _json_writer(data: dict) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, flush it to disk, then rename it over `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
