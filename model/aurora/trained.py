"""Light checkpoints: what training changed, and nothing of the base (8 M values with LoRA and [SEG] rows, not 8.5 G).

A folder, of a run or of an export, with

    adapter_model.safetensors  every parameter that this or an earlier stage trained, and always text_hidden_fcs,
                               learnable tokens and SAM's mask decoder, so that one file says how masks are made; in
                               peft's own format, relative to `AuroraModel`
    adapter_config.json        where there is LoRA: with it `PeftModel.from_pretrained(model, folder)` reads the file
    trained.json               settings that the names depend on, where base and SAM came from, digest of the tensors

Strict both ways: a tensor without a place in the model and a parameter that was or is trained without a tensor are
errors. (The released test script loads with strict=False and reads no result, train_ds_test.py:243.) Under bf16 the
tensors are the engine's bf16 weights; the optimiser's float32 copies belong to training checkpoints.

`read_trained` also reads what earlier versions wrote (`FORMATS`), and a merged export, of which it takes the parts that
a light checkpoint always holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from configs.schema import ModelConfig, TrainableConfig
from model.aurora.model import AuroraModel
from model.aurora.trainable import MASK_DECODER, QUERIES, SEG_HEAD, is_adapter
from utils.errors import WeightsError
from utils.files import file_digest, write_json
from utils.tensor_files import load_safetensors, write_safetensors

TENSORS, SETTINGS = "adapter_model.safetensors", "trained.json"
FORMATS = (1, 2, 3)
"""1: one file under our names, trained.safetensors. 2: exports, with head and mask decoder in files of their own. 3:
this one, the only one that is written."""
SEGMENTER = "segmenter.sam."
SAM_FILES = ("sam.safetensors", "mask_decoder.safetensors", "sam2/model.safetensors")
"""Files under SAM's own names: of merged exports, of format 2, and of merged exports with SAM 2."""
PEFT_PREFIX = "base_model.model."
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
    """By the names of `AuroraModel`."""
    origin: ModelConfig | None = None
    """Where base and SAM came from; None for a model that was put together by hand."""


def trained_names(model: AuroraModel) -> set[str]:
    """Names of the parameters that may differ from the base: trained now, trained earlier, or always saved."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in model.loaded_names or name.startswith((SEG_HEAD, QUERIES, MASK_DECODER))
    }


def gather_trained(model: AuroraModel, folder: str | Path) -> Trained:
    """The light checkpoint of `model` in CPU memory, for `folder`.

    Args:
        model: after `apply_trainable`; under ZeRO-3 its parameters are gathered one by one, so every rank must call.
        folder: where it will be written.

    Raises:
        RuntimeError: the model has no trainable settings.
    """
    if model.trainable_config is None:
        raise RuntimeError("the model has no trainable settings; call apply_trainable first")
    names = trained_names(model)
    tensors = {name: _whole(parameter) for name, parameter in model.named_parameters() if name in names}
    return Trained(Path(folder), model.trainable_config, model.seg_token_id, tensors, model.origin)


def save_trained(model: AuroraModel, folder: str | Path, write: bool = True) -> None:
    """Write the light checkpoint of `model` (see `gather_trained`) into `folder`, if this rank is to write."""
    trained = gather_trained(model, folder)
    if write:
        write_trained(trained)


def write_trained(trained: Trained) -> None:
    """Write a light checkpoint into its folder, in place of an earlier one; each file appears whole."""
    trained.folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(trained.folder / TENSORS, {
        PEFT_PREFIX + _peft_name(name): x[None] if name.endswith(".seg_row") else x
        for name, x in trained.tensors.items()
    })  # fmt: skip
    adapted = {name.split(".lora_A.")[0] for name in trained.tensors if ".lora_A." in name}
    if adapted:
        rows = (name.removesuffix(".seg_row") for name in trained.tensors if name.endswith(".seg_row"))
        LoraConfig(
            r=trained.trainable.lora_rank,
            lora_alpha=trained.trainable.lora_alpha,
            lora_dropout=trained.trainable.lora_dropout,
            target_modules=sorted(adapted),
            trainable_token_indices={name: [trained.seg_token_id] for name in rows} or None,
            base_model_name_or_path=trained.origin.base if trained.origin else None,
            inference_mode=True,
        ).save_pretrained(str(trained.folder))
    write_settings(trained, [TENSORS])


def write_settings(trained: Trained, files: Sequence[str]) -> None:
    """Write trained.json, last of all: it holds the SHA-256 of the `files` that `read_trained` is to read."""
    write_json(trained.folder / SETTINGS, {
        "format": FORMATS[-1],
        "seg_token_id": trained.seg_token_id,
        "trainable": trained.trainable.model_dump(mode="json"),
        "model": trained.origin and trained.origin.model_dump(mode="json"),
        "sha256": {name: file_digest(trained.folder / name) for name in files},
    })  # fmt: skip


def read_trained(path: str | Path) -> Trained:
    """Read a light checkpoint or an export.

    Args:
        path: its folder, or a run or checkpoint folder (see `find_trained`).

    Raises:
        WeightsError: no checkpoint there, a file is damaged, or the files do not belong together.
    """
    folder = find_trained(path)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        version, files, seg_token_id = (settings[name] for name in ("format", "sha256", "seg_token_id"))
        # JSON has lists where the strict schema wants tuples, hence the JSON mode.
        trainable = TrainableConfig.model_validate_json(json.dumps(settings["trainable"]))
        origin = settings.get("model") and ModelConfig.model_validate_json(json.dumps(settings["model"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder / SETTINGS}: not the settings of a light checkpoint ({error})") from error
    if version not in FORMATS:
        raise WeightsError(f"{folder / SETTINGS}: format {version}, but this code reads formats {FORMATS}")
    tensors: dict[str, Tensor] = {}
    for name, digest in (files if isinstance(files, dict) else {"trained.safetensors": files}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise WeightsError(
                f"{folder / name}: missing, or not the file that {SETTINGS} describes (its SHA-256 differs). Remedy: "
                "copy all files of one checkpoint, or save it again."
            )
        prefix = SEGMENTER if name in SAM_FILES else ""
        stored = {prefix + _own_name(key): x for key, x in load_safetensors(folder / name).items()}
        tensors |= {k: x for k, x in stored.items() if not prefix or k.startswith(MASK_DECODER)}
    tensors = {name: x[0] if name.endswith(".seg_row") and x.dim() == 2 else x for name, x in tensors.items()}
    return Trained(folder, trainable, seg_token_id, below_adapters(tensors), origin)


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
    model.load_state_dict(trained.tensors, strict=False)
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
    model.load_state_dict(stored, strict=False)


def below_adapters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; plain parameters of layers with LoRA among them are named below `.base_layer.`, as in peft."""
    adapted = {name.split(".lora_")[0] for name in tensors if ".lora_A." in name}
    plain = {name: name.rpartition(".") for name in tensors if not is_adapter(name)}
    moved = {name: f"{layer}.base_layer.{last}" for name, (layer, _, last) in plain.items() if layer in adapted}
    return {moved.get(name, name): tensor for name, tensor in tensors.items()}


def _peft_name(name: str) -> str:
    """Our name -> peft's."""
    return re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name).replace(
        ".seg_row", ".token_adapter.trainable_tokens_delta"
    )


def _own_name(key: str) -> str:
    """The inverse of `_peft_name`, prefix included; our names stay as they are."""
    name = re.sub(r"(\.lora_[AB])\.(?!default\.)", r"\1.default.", key.removeprefix(PEFT_PREFIX))
    return name.replace(".token_adapter.trainable_tokens_delta", ".seg_row")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def _whole(parameter: nn.Parameter) -> Tensor:
    """A copy on the CPU, gathered from all ranks where ZeRO-3 has partitioned it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().to("cpu", copy=True).contiguous()
    from utils.ds import deepspeed  # imported only where DeepSpeed is in use already

    with deepspeed.zero.GatheredParameters(parameter):
        return parameter.detach().to("cpu", copy=True).contiguous()
