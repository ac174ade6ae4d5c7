"""Trained models to hand on, and their way back: light (what training changed) or merged (the whole model).

    light     adapter_model.safetensors, ...      a light checkpoint (`model.aurora.trained`), as runs write it
    merged    config.json, model*.safetensors     the backbone under the released names, adapters merged in
              sam.safetensors, or sam2/           the whole SAM at its image size
              seg_head.safetensors, trained.json  text_hidden_fcs; settings
    both      sam.json, README.md                 sizes of a SAM that is not a released one; the model card

`from_pretrained` reads both, and so does `eval.checkpoint` (`trained.read_trained`). A light one serves as `init_from`
and `sft.teacher_checkpoint`, too; a merged folder is base, SAM and checkpoint at once. A LoRA update is
added to its weight in float32 and rounded once to the stored type, so in float32 the two exports agree to rounding, in
bf16 to one unit in the last place of the adapted weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft.tuners.lora import LoraLayer
from torch import Tensor

from configs.schema import ModelConfig, RunConfig, TrainableConfig
from model.aurora.build import backbone_kind, build_sam
from model.aurora.model import AuroraModel
from model.aurora.sampling import GENERATION_CONFIG, read_generation_defaults
from model.aurora.trainable import SEG_HEAD, apply_trainable, is_adapter
from model.aurora.trained import (
    SEGMENTER,
    SETTINGS,
    Trained,
    gather_trained,
    load_trained,
    read_trained,
    write_settings,
    write_trained,
)
from model.segmenters.sam import SAM_SIZES
from utils.errors import DataError, WeightsError
from utils.tables import text
from utils.tensor_files import read_json, write_safetensors

SAM, HEAD, SAM_JSON, CARD = "sam.safetensors", "seg_head.safetensors", "sam.json", "README.md"
SAM2 = "sam2"
"""Folder of SAM 2, in transformers' layout."""
MERGED_TRAINABLE = TrainableConfig(lora_rank=0, lora_targets=(), full=(), seg_head=True, mask_decoder=True)
TEMPLATE = Path(__file__).with_name("card.md.jinja")
SCORES = ("J", "F", "J&F", "S")
SHARES = ("class_accuracy", "format_share", "faithful")


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
    folder, origin = Path(folder), model.origin
    folder.mkdir(parents=True, exist_ok=True)
    if origin.segmenter == "sam" and origin.sam_type not in SAM_SIZES:
        model.segmenter.sizes.to_json(folder / SAM_JSON)
        origin = origin.model_copy(update={"sam_type": SAM_JSON})
    if not merge:
        write_trained(replace(gather_trained(model, folder), origin=origin))
        return folder
    state = merged_state(model)
    save, kind = backbone_kind(model.origin.base).save, str(model.backbone.dtype).removeprefix("torch.")
    save(model.backbone.config, _below("backbone.", state), folder, kind)
    sam = SAM
    if origin.segmenter == "sam2":
        sam = SAM2
        model.segmenter.sam.save_pretrained(folder / sam, state_dict=_below(SEGMENTER, state))
    else:
        write_safetensors(folder / sam, _below(SEGMENTER, state))
    write_safetensors(folder / HEAD, {name: x for name, x in state.items() if name.startswith(SEG_HEAD)})
    if (Path(origin.base) / GENERATION_CONFIG).is_file():
        shutil.copyfile(Path(origin.base) / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    origin = origin.model_copy(update={"base": ".", "sam_checkpoint": sam})
    files = [f"{SAM2}/model.safetensors" if sam == SAM2 else SAM, HEAD]
    write_settings(Trained(folder, MERGED_TRAINABLE, model.seg_token_id, {}, origin), files)
    return folder


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    base: str | Path | None = None,
    sam_checkpoint: str | Path | None = None,
) -> AuroraModel:
    """The joint model of an export, or of a run's light checkpoint.

    Args:
        folder: see `read_trained`.
        dtype: of all weights; None = as stored.
        device: where they go.
        attention: "eager" or "sdpa"; None = as the run that was exported.
        base, sam_checkpoint: of a light one, where they are not in the places that it remembers.

    Returns:
        AuroraModel in eval mode, frozen.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit.
    """
    trained = read_trained(folder)
    origin = resolve_origin(trained, base, sam_checkpoint)
    dtype = next(iter(trained.tensors.values())).dtype if dtype is None else dtype
    backbone, _ = backbone_kind(origin.base).load(origin.base, dtype, attention or origin.attention, device)
    model = AuroraModel(backbone, build_sam(origin), trained.seg_token_id)
    apply_trainable(model, trained.trainable)
    load_trained(model, trained)
    model.origin = origin
    model.generation_defaults = read_generation_defaults(origin.base)
    return model.to(device, dtype).requires_grad_(False).eval()


def resolve_origin(
    trained: Trained, base: str | Path | None = None, sam_checkpoint: str | Path | None = None
) -> ModelConfig:
    """The model section of an export with paths that exist: those given, else those remembered (also relative to it).

    Raises:
        WeightsError: the base or SAM is nowhere.
    """
    if trained.origin is None:
        raise WeightsError(f"{trained.folder}: does not say where its base and SAM are. Remedy: write an export of its "
                           "run with scripts/export.py.")  # fmt: skip
    found = {}
    for field, given in (("base", base), ("sam_checkpoint", sam_checkpoint), ("sam_type", None)):
        path = Path(getattr(trained.origin, field) if given is None else given)
        if field == "sam_type" and (trained.origin.segmenter != "sam" or str(path) in SAM_SIZES):
            continue
        inside = trained.folder / path
        if given is None and inside.exists():
            path = inside
        if not path.exists():
            raise WeightsError(f"{trained.folder}: {field} is {path}, which does not exist. Remedy: pass {field}= with "
                               "its place.")  # fmt: skip
        found[field] = str(path)
    return trained.origin.model_copy(update=found)


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


def write_card(folder: str | Path, config: RunConfig, metrics: Iterable[dict[str, Any]] = ()) -> None:
    """Write the model card of an export, README.md. No number is invented: without metrics it says "Not evaluated".

    Args:
        folder: of the export.
        config: of the run that was exported.
        metrics: of its evaluations, see `read_metrics`.
    """
    folder, metrics = Path(folder), list(metrics)
    merged = (folder / HEAD).is_file()
    data = ModelCardData(
        library_name="pytorch" if merged else "peft",
        pipeline_tag="mask-generation",
        base_model=config.model.base,
        tags=["audio-visual segmentation", "reasoning segmentation", "Ref-AVS", "AURORA"],
        model_name=f"aurora-{config.stage}" if metrics else None,
        eval_results=[result for m in metrics for result in _results(m)] or None,
    )
    rows = [
        [m["split"], protocol, m["scores"]["n"], *(m["scores"][protocol].get(name) for name in SCORES),
         *(m["scores"].get(name) for name in SHARES)]
        for m in metrics
        for protocol in m["protocols"]
    ]  # fmt: skip
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD)
    ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        merged=merged,
        config=config,
        seg_token_id=read_json(folder / SETTINGS)["seg_token_id"],
        rows=[[text(cell) for cell in row] for row in rows],
        checkpoints=sorted({str(m.get("checkpoint_sha256", "unknown"))[:12] for m in metrics}),
        probes=sorted({str(m.get("probe", "none")) for m in metrics}),
        code=metrics[0].get("git", "unknown") if metrics else None,
        files={path.name: path.stat().st_size for path in files},
    ).save(folder / CARD)


def read_metrics(path: str | Path) -> dict[str, Any]:
    """A metrics.json of train_ds_test.py.

    Raises:
        DataError: unreadable, or without a split and its scores.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        data["split"], data["scores"]["n"], data["protocols"]  # noqa: B018 - the fields that a card needs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no metrics of an evaluation ({error!r}). Remedy: name a metrics.json of train_ds_test.py."
        ) from error
    return data


def _results(metrics: dict[str, Any]) -> list[EvalResult]:
    """The scores of one evaluation under its first protocol, for the hub's model index."""
    protocol, split = metrics["protocols"][0], metrics["split"]
    return [
        EvalResult("mask-generation", "ref-avs", "Ref-AVS", name, round(metrics["scores"][protocol][name], 4),
                   metric_name=f"{name} ({protocol})", dataset_split=split)
        for name in SCORES
        if name in metrics["scores"][protocol]
    ]  # fmt: skip


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries below `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
