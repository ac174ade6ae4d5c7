"""What is trained: LoRA adapters and whole parameters, both chosen by name; everything else is frozen.

The published trainer (train_ds.py:164-284) trains, at every stage: LoRA of rank 8 on each linear layer whose name holds
q_proj or v_proj except the vision tower's, which reaches the language model, BEATs and SAM's mask decoder (the last
two because their exclusions are commented out at :215 and :217); and embed_tokens, lm_head, the mask decoder and
text_hidden_fcs whole. `TrainableConfig` can say that or less. Patterns are searched (`re.search`) in the names of the
joint model:

    language model   backbone.language_model.model.layers.L.self_attn.{q,v}_proj
    BEATs            backbone.audio_tower.encoder.layers.L.self_attn.{q,v}_proj
    mask decoder     segmenter.sam.mask_decoder.transformer. ... .{q,v}_proj

Frozen means `requires_grad` off, eval mode (`AuroraModel.train`), and absent from optimiser and light checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from configs.schema import TrainableConfig
from model.aurora.model import AuroraModel
from model.aurora.prompter import QUERIES
from model.aurora.seg_rows import train_seg_rows
from utils.errors import ConfigError, Problem

MASK_DECODER = "segmenter.sam.mask_decoder."
SEG_HEAD = "text_hidden_fcs."
NO_GRADIENT = ("segmenter.sam.image_encoder.", "segmenter.sam.prompt_encoder.")
"""Parts that every forward runs without gradient (`Segmenter.encode`), so that training them would do nothing."""


@dataclass(frozen=True)
class ComponentCount:
    """Parameter values of one component."""

    name: str
    trainable: int
    total: int


def apply_trainable(model: AuroraModel, config: TrainableConfig) -> None:
    """Freeze everything, then inject the adapters and unfreeze what `config` names, in place.

    Names of adapted layers gain `.base_layer` (peft); patterns are matched against the names without it. The choice is
    kept as `model.trainable_config` for light checkpoints.

    Raises:
        ConfigError: every pattern that matches nothing, or only what no gradient reaches; all at once.
        RuntimeError: the model already has adapters.
    """
    if model.trainable_config is not None:
        raise RuntimeError("apply_trainable was already called on this model; build a new one")
    targets, problems = _lora_targets(model, config)
    whole, more = _whole_parameters(model, config)
    if problems or more:
        raise ConfigError(problems + more, "trainable")
    model.requires_grad_(False)
    if targets:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="|".join(re.escape(name) for name in targets),  # a string is matched in full
        )
        inject_adapter_in_model(lora, model)
    if config.seg_rows_only:
        train_seg_rows(model.backbone.language_model, model.seg_token_id)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.replace(".base_layer.", ".") in whole)
    model.trainable_config = config
    model.train(model.training)


def is_adapter(name: str) -> bool:
    """Whether a parameter name belongs to an adapter: a LoRA matrix or a [SEG] row."""
    return ".lora_A." in name or ".lora_B." in name or name.endswith(".seg_row")


def freeze(model: AuroraModel, prefix: str) -> None:
    """Freeze all parameters below `prefix`, adapters included."""
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            parameter.requires_grad_(False)
    model.train(model.training)


def component_counts(model: AuroraModel) -> list[ComponentCount]:
    """Trainable and total values per component, in the order of `model.components`."""
    counts = []
    for name in model.components:
        sizes = [(_size(p), p.requires_grad) for p in model.get_submodule(name).parameters()]
        counts.append(ComponentCount(name, sum(n for n, on in sizes if on), sum(n for n, _ in sizes)))
    return counts


def total_count(counts: list[ComponentCount]) -> ComponentCount:
    """Their sum, named total."""
    return ComponentCount("total", sum(c.trainable for c in counts), sum(c.total for c in counts))


def format_counts(counts: list[ComponentCount]) -> str:
    """The counts as aligned lines with a total."""
    rows = [*counts, total_count(counts)]
    width = max(len(c.name) for c in rows)
    return "\n".join(f"{c.name:<{width}}  {c.trainable:>15,} of {c.total:>15,} trained" for c in rows)


def _lora_targets(model: AuroraModel, config: TrainableConfig) -> tuple[list[str], list[Problem]]:
    """Names of the linear layers that get an adapter, in model order."""
    if config.lora_rank == 0:
        return [], []
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    problems = []
    for i, pattern in enumerate(config.lora_targets):
        found = {name for name in linear if re.search(pattern, name)}
        problems += _judge(f"trainable.lora_targets[{i}]", pattern, found, "linear layer", linear)
        chosen |= found
    return [name for name in linear if name in chosen], problems


def _whole_parameters(model: AuroraModel, config: TrainableConfig) -> tuple[set[str], list[Problem]]:
    """Names of the parameters that are trained whole."""
    names = [name for name, _ in model.named_parameters()]
    whole: set[str] = set()
    problems = []
    for i, pattern in enumerate(config.full):
        found = {name for name in names if re.search(pattern, name)}
        problems += _judge(f"trainable.full[{i}]", pattern, found, "parameter", names)
        whole |= found
    for flag, prefix in ((config.seg_head, (SEG_HEAD, QUERIES)), (config.mask_decoder, MASK_DECODER)):
        whole |= {name for name in names if flag and name.startswith(prefix)}
    return whole, problems


def _judge(field: str, pattern: str, found: set[str], kind: str, names: list[str]) -> list[Problem]:
    if not found:
        remedy = f"compare with a name such as {names[0]} or {names[-1]}"
        return [Problem(field, pattern, f"matches no {kind} of the model", remedy)]
    dead = sorted(name for name in found if name.startswith(NO_GRADIENT))
    if dead:
        remedy = "write the pattern so that it spares SAM's image and prompt encoders"
        return [Problem(field, pattern, f"matches {len(dead)} that no gradient reaches, such as {dead[0]}", remedy)]
    return []


def _size(parameter: nn.Parameter) -> int:
    """Number of values, also where ZeRO-3 holds only a part of them here."""
    return getattr(parameter, "ds_numel", parameter.numel())
