"""Light checkpoints: what training changed, and nothing of the base (8 M values with LoRA and [SEG] rows, not 8.5 G).

A folder with two files:

    trained.safetensors   every parameter that this or an earlier stage trained, and always text_hidden_fcs, learnable
                          tokens and SAM's mask decoder, so that one file says how masks are made
    trained.json          settings that the names depend on, names, digest of the other file

Strict both ways: a tensor without a place in the model and a parameter that was or is trained without a tensor are
errors. (The published test script loads with strict=False and reads no result, train_ds_test.py:243.) Under bf16 the
tensors are the engine's bf16 weights; the optimiser's float32 copies belong to training checkpoints.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.schema import TrainableConfig
from model.aurora.model import AuroraModel
from model.aurora.trainable import MASK_DECODER, QUERIES, SEG_HEAD
from utils.errors import WeightsError
from utils.manifest import file_digest
from utils.tensor_files import save_safetensors

TENSORS = "trained.safetensors"
SETTINGS = "trained.json"
FORMAT = 1
EXPORT_FORMAT = 2
"""`format` of the settings of an export (`model.aurora.export`), which can be read in a light checkpoint's place."""
SHOWN = 8
"""Names that an error spells out before it counts the rest."""
SAME_SETTINGS = ("lora_rank", "lora_alpha", "seg_rows_only")
"""Fields of `TrainableConfig` that change what a tensor means; the others show in the names."""


@dataclass(frozen=True)
class Trained:
    """A light checkpoint in memory."""

    folder: Path
    trainable: TrainableConfig
    seg_token_id: int
    tensors: dict[str, Tensor]


def trained_names(model: AuroraModel) -> set[str]:
    """Names of the parameters that may differ from the base: trained now, trained earlier, or always saved."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in model.loaded_names or name.startswith((SEG_HEAD, QUERIES, MASK_DECODER))
    }


def save_trained(model: AuroraModel, folder: str | Path, write: bool = True) -> None:
    """Write the light checkpoint of `model`; each file appears whole, the settings last.

    Args:
        model: after `apply_trainable`; under ZeRO-3 its parameters are gathered one by one, so every rank must call.
        folder: made if needed; an earlier checkpoint there is replaced.
        write: whether this rank writes.

    Raises:
        RuntimeError: the model has no trainable settings.
    """
    config = model.trainable_config
    if config is None:
        raise RuntimeError("save_trained: the model has no trainable settings; call apply_trainable first")
    names = trained_names(model)
    tensors = {name: _whole(parameter) for name, parameter in model.named_parameters() if name in names}
    if write:
        write_trained(Trained(Path(folder), config, model.seg_token_id, tensors))


def write_trained(trained: Trained) -> None:
    """Write a light checkpoint into its folder; each file appears whole, the settings last."""
    folder, tensors = trained.folder, trained.tensors
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{TENSORS}.part"
    save_safetensors(tensors, part)
    settings = {
        "format": FORMAT,
        "trainable": trained.trainable.model_dump(mode="json"),
        "seg_token_id": trained.seg_token_id,
        "sha256": file_digest(part),
        "names": sorted(tensors),
    }
    (folder / f"{SETTINGS}.part").write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(part, folder / TENSORS)
    os.replace(folder / f"{SETTINGS}.part", folder / SETTINGS)


def read_trained(path: str | Path) -> Trained:
    """Read a light checkpoint.

    Args:
        path: its folder, or a run or checkpoint folder (see `find_trained`).

    Raises:
        WeightsError: no checkpoint there, a file is damaged, or the two files do not belong together.
    """
    folder = find_trained(path)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        version, digest = settings["format"], settings["sha256"]
        if version == EXPORT_FORMAT:
            return _read_export(folder, settings)
        # JSON has lists where the strict schema wants tuples, hence the JSON mode.
        trainable = TrainableConfig.model_validate_json(json.dumps(settings["trainable"]))
        seg_token_id = settings["seg_token_id"]
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / SETTINGS}: not the settings of a light checkpoint ({error})") from error
    if version != FORMAT:
        raise WeightsError(f"{folder / SETTINGS}: format {version}, but this code reads format {FORMAT}")
    if not (folder / TENSORS).is_file() or file_digest(folder / TENSORS) != digest:
        raise WeightsError(
            f"{folder / TENSORS}: missing, or not the file that {SETTINGS} describes (its SHA-256 differs). Remedy: "
            "copy both files of one checkpoint, or save it again."
        )
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise WeightsError(f"{folder / TENSORS}: not a safetensors file ({error})") from error
    return Trained(folder, trainable, seg_token_id, tensors)


def _read_export(folder: Path, settings: dict) -> Trained:
    from model.aurora.export import read_export  # imported late: exports are made of what this module reads

    return read_export(folder, settings)


def find_trained(path: str | Path) -> Path:
    """The folder with the light checkpoint that `path` means: itself, or the last one up to three levels below it.

    A run keeps its last weights in `final`, which is preferred; otherwise the highest step in a folder's name counts.

    Raises:
        WeightsError: none found.
    """
    path = Path(path)
    for folder in (path, path / "final"):
        if (folder / SETTINGS).is_file():
            return folder
    found = [file for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}/{SETTINGS}")]
    if not found:
        raise WeightsError(
            f"{path}: no light checkpoint ({SETTINGS}) in it or up to three levels below. Remedy: name the folder of a "
            "finished or running run, or one of its checkpoints."
        )
    return max(found, key=lambda file: [int(n) for n in re.findall(r"\d+", str(file.relative_to(path)))]).parent


def check_fit(trained: Trained, model: AuroraModel) -> None:
    """Refuse a checkpoint whose settings, names or shapes are not those of `model`.

    Raises:
        WeightsError: everything that differs, with the remedy.
    """
    config = model.trainable_config
    problems = [
        f"trainable.{field} is {getattr(trained.trainable, field)!r} there and {getattr(config, field)!r} here"
        for field in SAME_SETTINGS
        if getattr(trained.trainable, field) != getattr(config, field)
    ]
    if trained.seg_token_id != model.seg_token_id:
        problems.append(f"[SEG] has id {trained.seg_token_id} there and {model.seg_token_id} here")
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    stored = {name: tuple(tensor.shape) for name, tensor in trained.tensors.items()}
    for complaint, names in (
        ("stored, but no parameter of this model", stored.keys() - shapes.keys()),
        ("trained here, but not stored", trained_names(model) - stored.keys()),
        ("of another shape", {n for n in stored.keys() & shapes.keys() if stored[n] != shapes[n]}),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
            problems.append(f"{complaint}: {', '.join(sorted(names)[:SHOWN])}{more}")
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(
            f"{trained.folder} does not fit this model:\n  {listed}\nRemedy: use the section `trainable`, the base and "
            f"the SAM of the run that wrote it (its settings are in {SETTINGS})."
        )


def load_trained(model: AuroraModel, source: str | Path | Trained) -> Trained:
    """Put a light checkpoint into `model`, strictly both ways.

    Args:
        model: after `apply_trainable`, not yet partitioned by an engine.
        source: a path (see `read_trained`) or a checkpoint already read.

    Returns:
        The checkpoint.

    Raises:
        WeightsError: it is missing, damaged or does not fit.
    """
    trained = source if isinstance(source, Trained) else read_trained(source)
    check_fit(trained, model)
    _copy(model, trained.tensors)
    model.loaded_names = model.loaded_names | trained.tensors.keys()
    return trained


def load_mask_decoder(model: AuroraModel, source: str | Path | Trained) -> None:
    """Take SAM's mask decoder alone from a light checkpoint (the student's start, paper section 3.1).

    Raises:
        WeightsError: its mask decoder has other parameters, for instance adapters.
    """
    trained = source if isinstance(source, Trained) else read_trained(source)
    stored = {name: x for name, x in trained.tensors.items() if name.startswith(MASK_DECODER)}
    own = {name: _shape(p) for name, p in model.named_parameters() if name.startswith(MASK_DECODER)}
    if {name: tuple(x.shape) for name, x in stored.items()} != own:
        different = sorted(stored.keys() ^ own.keys())[:5] or "shapes"
        raise WeightsError(
            f"{trained.folder}: its mask decoder differs from this model's in {different}. Remedy: use the same SAM "
            "and the same trainable.lora_targets in both runs."
        )
    _copy(model, stored)


@torch.no_grad()
def _copy(model: AuroraModel, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _whole(parameter: nn.Parameter) -> Tensor:
    """A copy on the CPU, gathered from all ranks where ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().to("cpu", copy=True).contiguous()
    from utils.ds import deepspeed  # imported only where DeepSpeed is in use already

    with deepspeed.zero.GatheredParameters(parameter):
        return parameter.detach().to("cpu", copy=True).contiguous()
