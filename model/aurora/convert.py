"""The published AURORA checkpoint -> a light checkpoint of this project.

| published (`mp_rank_00_model_states.pt`, DeepSpeed) | here |
|---|---|
| names of peft 0.4: `base_model.model.` in front, adapted weights without `.base_layer` | our names |
| `model.visual_model.*`, `model.text_hidden_fcs.*` | `segmenter.sam.*`, `text_hidden_fcs.*` |
| LoRA on every q_proj and v_proj of language model, BEATs and mask decoder (train_ds.py:204-224) | `lora_targets` |
| all 8.5 G weights, frozen ones too | what differs from base and SAM |
| 151,647 rows of embed_tokens and lm_head (train_ds.py:242 shrinks them to the tokenizer's length) | 152,064 rows |

The rows: an id is a row number, so the 151,647 rows go to the same places and [SEG] keeps its id, the last of them. The
417 rows behind them exist only in the base; they belong to no token, are never in a prompt, and keep the base's values,
which the base was trained to never choose. Zeros would be worse: a logit of 0 can beat that of a real token.

Frozen weights must be the base's. Equal ones are dropped; the published code loads SigLIP in float16 before it casts to
bf16, so a difference within rounding counts as equal. Anything else that differs is kept as trained, and reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import TrainableConfig
from model.aurora.trainable import MASK_DECODER, NO_GRADIENT, SEG_HEAD
from model.aurora.trained import Trained
from model.backbones.videollama2.names import from_released, to_released
from model.backbones.videollama2.shards import Checkpoint
from utils.tensor_files import TensorFileError, load_pickle

BACKBONE = "backbone."
VOCABULARY = ("backbone.language_model.model.embed_tokens.weight", "backbone.language_model.lm_head.weight")
PREFIXES = ("module.", "base_model.model.")
PARTS = (("model.visual_model.", "segmenter.sam."), ("model.text_hidden_fcs.", SEG_HEAD))
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)$|segmenter\.sam\.pixel_(mean|std)$")
"""Constants that are computed here."""
TARGETS = (
    r"language_model\..*\.(q_proj|v_proj)$",
    r"audio_tower\..*\.(q_proj|v_proj)$",
    r"mask_decoder\..*\.(q_proj|v_proj)$",
)
ROUNDING = 2.0**-7
"""Relative difference of two bf16 roundings of one number."""


@dataclass
class ConversionReport:
    """What became of every tensor of the file."""

    counts: Counter = field(default_factory=Counter)
    """(part of the model, fate) -> tensors; fates: adapter, trained, same, same to rounding, changed, ignored."""
    values: Counter = field(default_factory=Counter)
    """The same in values."""
    changed: list[str] = field(default_factory=list)
    """Frozen in the published trainer, yet not the base's."""
    unknown: list[str] = field(default_factory=list)
    """Names without a place."""
    rows: tuple[int, int] = (0, 0)
    """Rows of the vocabulary matrices: in the file, in the base."""
    seg_token_id: int = -1

    def add(self, name: str, fate: str, tensor: Tensor) -> None:
        key = (name.split(".")[1] if name.startswith((BACKBONE, "segmenter.")) else name.split(".")[0], fate)
        self.counts[key] += 1
        self.values[key] += tensor.numel()


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the published checkpoint under our names, adapters in the middle of names (`.lora_A.default.`).

    Args:
        path: DeepSpeed's model states, or a plain state dict of the same names.

    Raises:
        TensorFileError: no such file, one that would run code, or one without a state dict.
    """
    data = load_pickle(path)
    state = data.get("module", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise TensorFileError(f"{path}: no `module` with names and tensors, as DeepSpeed's model states have it")
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = our_name(name)
        if ours in named and not torch.equal(named[ours], tensor):
            raise TensorFileError(f"{path}: {name} differs from its copy under another layer")
        named[ours] = tensor
    return named


def our_name(name: str) -> str:
    """Our name of a published key (base weights of adapted layers without `.base_layer.`)."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = name.replace(".base_layer.", ".")
    for published, ours in PARTS:
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return BACKBONE + from_released(name)


def published_name(name: str, peft: bool = True) -> str:
    """The inverse of `our_name` (the shared position table under its first layer)."""
    name = name.replace(".base_layer.", ".")
    for published, ours in PARTS:
        if name.startswith(ours):
            name = published + name.removeprefix(ours)
            break
    else:
        name = to_released(name.removeprefix(BACKBONE), 1)[0]
    return f"base_model.model.{name}" if peft else name


def convert(
    published: Mapping[str, Tensor],
    base: Checkpoint,
    sam: Mapping[str, Tensor],
    names: Mapping[str, tuple[int, ...]],
    folder: Path,
    alpha: float = 16.0,
    seg_token_id: int | None = None,
) -> tuple[Trained, ConversionReport]:
    """Map a published checkpoint.

    Args:
        published: from `read_published`.
        base: the released backbone.
        sam: SAM's tensors at the checkpoint's image size, SAM's own names.
        names: shapes of our plain joint model (no adapters), by name.
        folder: where the result will be written.
        alpha: LoRA's scale, which the file does not hold (published code train_ds.py:87: 16).
        seg_token_id: None = the last row of the file.

    Returns:
        (light checkpoint in memory, report); `report.unknown` must be empty for it to be whole.

    Raises:
        TensorFileError: adapters of several ranks, more rows than the base has, or a shape that does not fit.
    """
    report = ConversionReport()
    adapters = {k: x for k, x in published.items() if ".lora_A." in k or ".lora_B." in k}
    adapted = {k.split(".lora_")[0] for k in adapters}
    kept: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name in adapters:
            report.add(name, "adapter", tensor)
            if name.split(".lora_")[0] + ".weight" not in names:
                report.unknown.append(name)
            kept[name] = tensor
        elif IGNORED.match(name):
            report.add(name, "ignored", tensor)
        elif name not in names:
            report.unknown.append(name)
        else:
            whole = _with_rows(name, tensor, base, report)
            if tuple(whole.shape) != tuple(names[name]):
                raise TensorFileError(f"{name} has shape {tuple(whole.shape)}, this model needs {tuple(names[name])}")
            fate = _fate(name, whole, base, sam)
            report.add(name, fate, tensor)
            if fate == "changed" and name.startswith(NO_GRADIENT):
                report.unknown.append(f"{name} (not that of the SAM file; nothing here could train it)")
                continue
            if fate == "changed":
                report.changed.append(name)
            if fate in ("trained", "changed"):
                kept[_below_adapter(name, adapted)] = whole
    trainable = _trainable(adapters, kept, report.changed, names, alpha)
    report.seg_token_id = report.rows[0] - 1 if seg_token_id is None else seg_token_id
    tensors = {k: x.contiguous() for k, x in kept.items()}
    return Trained(folder, trainable, report.seg_token_id, tensors), report


def _with_rows(name: str, tensor: Tensor, base: Checkpoint, report: ConversionReport) -> Tensor:
    """Vocabulary matrices on the base's rows; other tensors as they are."""
    if name not in VOCABULARY:
        return tensor
    own = base.get(to_released(name.removeprefix(BACKBONE), 1)[0]).to(tensor.dtype)
    report.rows = (len(tensor), len(own))
    if len(tensor) > len(own):
        raise TensorFileError(
            f"{name} has {len(tensor)} rows, the base {len(own)}: they are not of one tokenizer. Remedy: give the base "
            "that the checkpoint was trained from."
        )
    return torch.cat([tensor, own[len(tensor) :]])


def _fate(name: str, tensor: Tensor, base: Checkpoint, sam: Mapping[str, Tensor]) -> str:
    """Whether a weight was trained, is the base's, or has changed though it was frozen."""
    if name.startswith((SEG_HEAD, MASK_DECODER)) or name in VOCABULARY:
        return "trained"
    if name.startswith(BACKBONE):
        released = to_released(name.removeprefix(BACKBONE), 1)[0]
        if released not in base.shapes:
            return "ignored"  # an unused head that the base does not store
        own = base.get(released)
    else:
        own = sam[name.removeprefix("segmenter.sam.")]
    own = own.to(tensor.dtype)
    if torch.equal(own, tensor):
        return "same"
    near = torch.isclose(own.float(), tensor.float(), rtol=ROUNDING, atol=1e-5)
    return "same to rounding" if bool(near.all()) else "changed"


def _trainable(
    adapters: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    changed: list[str],
    names: Mapping[str, tuple[int, ...]],
    alpha: float,
) -> TrainableConfig:
    """The section `trainable` that describes the checkpoint."""
    ranks = {x.shape[0] for k, x in adapters.items() if ".lora_A." in k}
    if len(ranks) > 1:
        raise TensorFileError(f"adapters of several ranks: {sorted(ranks)}; one rank is needed")
    modules = {k.split(".lora_A.")[0] for k in adapters if ".lora_A." in k}
    linear = {k.removesuffix(".weight") for k in names if k.endswith(".weight")}
    whole = [re.escape(name) + "$" for name in (*(v for v in VOCABULARY if v in kept), *changed)]
    return TrainableConfig(
        lora_rank=ranks.pop() if ranks else 0,
        lora_alpha=alpha,
        lora_targets=tuple(_patterns(modules, linear)),
        full=tuple(whole),
        seg_head=True,
        mask_decoder=True,
    )


def _patterns(modules: set[str], linear: set[str]) -> Iterator[str]:
    """The published patterns where they match exactly the adapted modules, else one pattern per module."""
    left = set(modules)
    for pattern in TARGETS:
        found = {name for name in linear if re.search(pattern, name)}
        if found and found <= modules and "image_encoder" not in " ".join(found):
            left -= found
            yield pattern
    yield from (f"^{re.escape(name)}$" for name in sorted(left))


def _below_adapter(name: str, adapted: set[str]) -> str:
    layer, _, last = name.rpartition(".")
    return f"{layer}.base_layer.{last}" if layer in adapted else name
