"""Trained models to hand on: light (what training changed) or merged (the whole model), and their way back.

    light     adapter_config.json, adapter_model.safetensors   LoRA, [SEG] rows and whole vocabulary matrices, in peft's
                                                               own format, relative to `AuroraModel`
              seg_head.safetensors                             text_hidden_fcs
              mask_decoder.safetensors                         SAM's decoder under SAM's own names
              trained_rest.safetensors                         what else was trained whole (only if something was)
              trained.json                                     settings, where base and SAM came from, digests
    merged    config.json, model*.safetensors                  the backbone under the released names, adapters merged in
              sam.safetensors (sam.json)                       the whole SAM at its image size
              seg_head.safetensors, trained.json

`from_pretrained` reads both, and so does `eval.checkpoint` (`model.aurora.trained.read_trained`). A light
export also serves as `init_from` and `sft.teacher_checkpoint`; a merged folder is base, SAM and checkpoint at once. A
LoRA update is added to its weight in float32 and rounded once to the stored type, so in float32 the two exports agree
to rounding, in bf16 to one unit in the last place of the adapted weights.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from configs.schema import ModelConfig, TrainableConfig
from model.aurora.model import AuroraModel
from model.aurora.sampling import GENERATION_CONFIG, read_generation_defaults
from model.aurora.trainable import MASK_DECODER, SEG_HEAD, apply_trainable, is_adapter
from model.aurora.trained import (
    EXPORT_FORMAT,
    SETTINGS,
    Trained,
    load_trained,
    read_trained,
    trained_names,
)
from model.backbones.videollama2.weights import load_backbone, save_state
from model.segmenters.sam import SAM_SIZES, build_segmenter
from utils.errors import WeightsError
from utils.manifest import file_digest
from utils.tensor_files import load_safetensors, read_json, save_safetensors

ADAPTER, HEAD, DECODER, REST = (
    f"{name}.safetensors" for name in ("adapter_model", "seg_head", "mask_decoder", "trained_rest")
)
SAM, SAM_JSON = "sam.safetensors", "sam.json"
PEFT_PREFIX = "base_model.model."
SEGMENTER = "segmenter.sam."
EMBEDDING, LM_HEAD = (f"backbone.language_model.{name}" for name in ("model.embed_tokens", "lm_head"))
MERGED_TRAINABLE = TrainableConfig(lora_rank=0, lora_targets=(), full=(), seg_head=True, mask_decoder=True)


def save_pretrained(model: AuroraModel, folder: str | Path, merge: bool = True) -> Path:
    """Write an export of `model`, which stays as it is; see the module's text for the files.

    Args:
        model: from `build_model` or `from_pretrained`; parameters whole (not partitioned by ZeRO-3).
        folder: made if needed.
        merge: the merged export, which needs nothing beside it; False = light.

    Raises:
        RuntimeError: the model does not know where its base and SAM came from, or writes no [SEG].
    """
    if model.origin is None or model.trainable_config is None:
        raise RuntimeError("save_pretrained: the model's base is unknown; make it by build_model or from_pretrained")
    if model.origin.prompter != "seg_token":
        raise RuntimeError(f"save_pretrained: only models that write [SEG] are exported, not {model.origin.prompter}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = _write_merged(model, folder) if merge else _write_light(model, folder)
    origin = model.origin
    if origin.sam_type not in SAM_SIZES:
        model.segmenter.sizes.to_json(folder / SAM_JSON)
        origin = origin.model_copy(update={"sam_type": SAM_JSON})
    if merge:
        if (Path(origin.base) / GENERATION_CONFIG).is_file():
            shutil.copyfile(Path(origin.base) / GENERATION_CONFIG, folder / GENERATION_CONFIG)
        origin = origin.model_copy(update={"base": ".", "sam_checkpoint": SAM})
    settings = {
        "format": EXPORT_FORMAT,
        "kind": "merged" if merge else "light",
        "seg_token_id": model.seg_token_id,
        "trainable": (MERGED_TRAINABLE if merge else model.trainable_config).model_dump(mode="json"),
        "model": origin.model_dump(mode="json"),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "sha256": {name: file_digest(folder / name) for name in files},
    }
    part = folder / f"{SETTINGS}.part"
    part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / SETTINGS)
    return folder


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    base: str | Path | None = None,
    sam_checkpoint: str | Path | None = None,
) -> AuroraModel:
    """The joint model of an export.

    Args:
        folder: written by `save_pretrained`.
        dtype: of all weights; None = as exported.
        device: where they go.
        attention: "eager" or "sdpa"; None = as the run that was exported.
        base, sam_checkpoint: of a light export, where they are not in the places that it remembers.

    Returns:
        AuroraModel in eval mode, frozen.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit.
    """
    folder = Path(folder)
    settings = read_json(folder / SETTINGS)
    if settings.get("format") != EXPORT_FORMAT:
        raise WeightsError(f"{folder}: no export. Remedy: write one with scripts/export.py.")
    trained = read_trained(folder)
    origin = resolve_origin(folder, settings, base, sam_checkpoint)
    dtype = getattr(torch, settings["dtype"]) if dtype is None else dtype
    backbone, _ = load_backbone(origin.base, dtype, attention or origin.attention, device)
    segmenter = build_segmenter(origin.sam_type, origin.sam_image_size, origin.sam_checkpoint)
    model = AuroraModel(backbone, segmenter, trained.seg_token_id)
    apply_trainable(model, trained.trainable)
    load_trained(model, trained)
    model.origin = origin
    model.generation_defaults = read_generation_defaults(origin.base)
    return model.to(device, dtype).requires_grad_(False).eval()


def resolve_origin(
    folder: Path, settings: dict[str, Any], base: str | Path | None = None, sam_checkpoint: str | Path | None = None
) -> ModelConfig:
    """The model section of an export with paths that exist: those given, else those remembered (also relative to it).

    Raises:
        WeightsError: the base or SAM is nowhere.
    """
    origin = ModelConfig.model_validate_json(json.dumps(settings["model"]))
    given = {"base": base, "sam_checkpoint": sam_checkpoint, "sam_type": None}
    found = {}
    for field, path in given.items():
        remembered = getattr(origin, field)
        if field == "sam_type" and remembered in SAM_SIZES:
            continue
        inside = settings["kind"] == "merged" or field == "sam_type"
        candidates = [Path(path)] if path is not None else [folder / remembered] if inside else [Path(remembered)]
        existing = [candidate for candidate in candidates if candidate.exists()]
        if not existing:
            raise WeightsError(
                f"{folder}: {field} is {candidates[0]}, which does not exist. Remedy: pass {field}= with its place."
            )
        found[field] = str(existing[0])
    return origin.model_copy(update=found)


def read_export(folder: Path, settings: dict[str, Any]) -> Trained:
    """What an export changed of base and SAM, under our names (called by `trained.read_trained`).

    Raises:
        WeightsError: a file is missing or not the one that trained.json describes.
    """
    for name, digest in settings["sha256"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise WeightsError(
                f"{folder / name}: missing, or not the file that {SETTINGS} describes (its SHA-256 differs). Remedy: "
                "copy all files of one export, or export again."
            )
    trainable = TrainableConfig.model_validate_json(json.dumps(settings["trainable"]))
    tensors = load_safetensors(folder / HEAD)
    if settings["kind"] == "merged":
        whole = load_safetensors(folder / SAM)
        tensors |= {f"{SEGMENTER}{k}": x for k, x in whole.items() if f"{SEGMENTER}{k}".startswith(MASK_DECODER)}
        return Trained(folder, trainable, settings["seg_token_id"], tensors)
    tensors |= {f"{SEGMENTER}{k}": x for k, x in load_safetensors(folder / DECODER).items()}
    for name in (ADAPTER, REST):
        if (folder / name).is_file():
            tensors |= {_from_peft(k): x for k, x in load_safetensors(folder / name).items()}
    tensors = {k: x[0] if k.endswith(".seg_row") and x.dim() == 2 else x for k, x in tensors.items()}
    adapted = {name.split(".lora_")[0] for name in tensors if ".lora_A." in name}
    tensors = {_below_adapter(k, adapted): x for k, x in tensors.items()}
    return Trained(folder, trainable, settings["seg_token_id"], tensors)


def merged_state(model: AuroraModel) -> dict[str, Tensor]:
    """State dict of the plain model (names without adapters): LoRA added, [SEG] rows put in their places."""
    state = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in model.state_dict().items()
        if not is_adapter(name)
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            key = f"{name}.weight"
            down, up = (getattr(module, f"lora_{side}")["default"].weight.detach().float() for side in "AB")
            merged = state[key].float() + module.scaling["default"] * (up @ down)
            state[key] = merged.to(state[key].dtype)
    for name, row in model.named_parameters():
        if name.endswith(".seg_row"):
            key = f"{name.removesuffix('seg_row')}weight"
            state[key] = state[key].clone()
            state[key][model.seg_token_id] = row.detach()
    return state


def _write_merged(model: AuroraModel, folder: Path) -> list[str]:
    """Backbone, SAM and head; returns the files that get a digest (the shards carry their own structure)."""
    state = merged_state(model)
    backbone = {k.removeprefix("backbone."): x for k, x in state.items() if k.startswith("backbone.")}
    config, kind = model.backbone.config, str(model.backbone.dtype).removeprefix("torch.")
    save_state(replace(config, extra=config.extra | {"torch_dtype": kind}), backbone, folder)
    _save(_part(state, SEGMENTER), folder / SAM)
    _save({k: x for k, x in state.items() if k.startswith(SEG_HEAD)}, folder / HEAD)
    return [SAM, HEAD]


def _write_light(model: AuroraModel, folder: Path) -> list[str]:
    """Everything that training changed, in up to four files; returns their names."""
    names = trained_names(model)
    changed = {k: p.detach() for k, p in model.named_parameters() if k in names}
    plain = {k.replace(".base_layer.", "."): x for k, x in changed.items() if not is_adapter(k)}
    head = {k: x for k, x in plain.items() if k.startswith(SEG_HEAD)}
    decoder = _part(plain, SEGMENTER, MASK_DECODER)
    others = {k: x for k, x in plain.items() if not k.startswith((SEG_HEAD, MASK_DECODER))}
    adapters = {k: x for k, x in changed.items() if is_adapter(k)}
    if any(".lora_A." in name for name in adapters):
        vocabulary = {k: others.pop(k) for k in (f"{EMBEDDING}.weight", f"{LM_HEAD}.weight") if k in others}
        adapters |= vocabulary
        _adapter_config(model, adapters, [name.removesuffix(".weight") for name in vocabulary]).save_pretrained(folder)
    else:
        others |= adapters  # peft has no adapter without LoRA layers; [SEG] rows alone go with the rest
        adapters = {}
    written = []
    for name, tensors in (
        (ADAPTER, {_to_peft(k): x[None] if k.endswith(".seg_row") else x for k, x in adapters.items()}),
        (HEAD, head),
        (DECODER, decoder),
        (REST, others),
    ):
        if tensors:
            _save(tensors, folder / name)
            written.append(name)
    return written


def _adapter_config(model: AuroraModel, adapters: dict[str, Tensor], whole: list[str]) -> LoraConfig:
    """peft's description of the adapter file; names are relative to `AuroraModel`."""
    settings = model.trainable_config
    rows = {k.removesuffix(".seg_row"): [model.seg_token_id] for k in adapters if k.endswith(".seg_row")}
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=sorted({k.split(".lora_A.")[0] for k in adapters if ".lora_A." in k}),
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
        base_model_name_or_path=model.origin.base,
        inference_mode=True,
    )


def _to_peft(name: str) -> str:
    """Our name -> the key in adapter_model.safetensors."""
    if name.endswith(".seg_row"):
        name = f"{name.removesuffix('seg_row')}token_adapter.trainable_tokens_delta"
    return PEFT_PREFIX + name.replace(".default.", ".")


def _from_peft(key: str) -> str:
    """The inverse of `_to_peft`; names without peft's prefix stay as they are."""
    name = key.removeprefix(PEFT_PREFIX)
    for side in (".lora_A.", ".lora_B."):
        name = name.replace(side, f"{side}default.") if f"{side}default." not in name else name
    return name.replace(".token_adapter.trainable_tokens_delta", ".seg_row")


def _below_adapter(name: str, adapted: set[str]) -> str:
    """A plain parameter of an adapted layer stands below `.base_layer`."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.base_layer.{last}" if layer in adapted else name


def _part(state: dict[str, Tensor], prefix: str, within: str | None = None) -> dict[str, Tensor]:
    """Entries below `within` (default: `prefix`), named without `prefix`."""
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(within or prefix)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file by temporary name and rename."""
    part = path.with_name(f".{path.name}.part")
    save_safetensors({k: x.detach().cpu().contiguous().clone() for k, x in tensors.items()}, part)
    os.replace(part, path)
