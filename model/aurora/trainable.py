"""What is trained: LoRA adapters and whole parameters, both chosen by name; everything else is frozen.

The released trainer (train_ds.py:164-284) trains, at every stage: LoRA of rank 8 on each linear layer whose name holds
q_proj or v_proj except the vision tower's, which reaches the language model, BEATs and SAM's mask decoder (the last
two because their exclusions are commented out at :215 and :217); and embed_tokens, lm_head, the mask decoder and
text_hidden_fcs whole. `TrainableConfig` can say that or less. Patterns are searched (`re.search`) in the names of the
joint model:

    language model   backbone.language_model.model.layers.L.self_attn.{q,v}_proj
    BEATs            backbone.audio_tower.encoder.layers.L.self_attn.{q,v}_proj
    mask decoder     segmenter.sam.mask_decoder.transformer. ... .{q,v}_proj

Frozen means `requires_grad` off, eval mode (`AuroraModel.train`), and absent from optimiser and light checkpoints.

The released code trains the vocabulary matrices whole (1.09 G values) because [SEG] is the only token without a trained
row. `trainable.seg_rows_only` is the lean alternative: the matrices stay frozen, and the [SEG] row of each is a
parameter of its own, `seg_row`, which takes the place of the stored row. All names of the base stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from configs.schema import TrainableConfig
from model.aurora.model import AuroraModel
from utils.errors import ConfigError, Problem

MASK_DECODER = "segmenter.sam.mask_decoder."
SEG_HEAD = "text_hidden_fcs."
QUERIES = "prompter.queries."
"""Learnable tokens (`model.aurora.ablations`)."""


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
    problems: list[Problem] = []
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name, _ in model.named_parameters()]
    patterns = config.lora_targets if config.lora_rank else ()
    targets = _matches(model, "trainable.lora_targets", patterns, "linear layer", linear, problems)
    whole = _matches(model, "trainable.full", config.full, "parameter", names, problems)
    for flag, prefix in ((config.seg_head, (SEG_HEAD, QUERIES)), (config.mask_decoder, MASK_DECODER)):
        whole |= {n for n in names if flag and n.startswith(prefix) and not n.startswith(_no_gradient(model))}
    if problems:
        raise ConfigError(problems, "trainable")
    # Frozen first: what nobody names, and what a later version adds, is not trained by accident.
    model.requires_grad_(False)
    if targets:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="|".join(re.escape(name) for name in linear if name in targets),  # matched in full
        )
        inject_adapter_in_model(lora, model)
    if config.seg_rows_only:
        _train_seg_rows(model.backbone.language_model, model.seg_token_id)
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


def _matches(
    model: AuroraModel, field: str, patterns: tuple[str, ...], kind: str, names: list[str], problems: list[Problem]
) -> set[str]:
    """The names in which a pattern is found; patterns that find nothing, or what no gradient reaches, are problems."""
    chosen: set[str] = set()
    for i, pattern in enumerate(patterns):
        found = {name for name in names if re.search(pattern, name)}
        dead = sorted(name for name in found if name.startswith(_no_gradient(model)))
        if not found:
            rule, remedy = f"matches no {kind} of the model", f"compare with a name such as {names[0]} or {names[-1]}"
            problems.append(Problem(f"{field}[{i}]", pattern, rule, remedy))
        elif dead:
            rule = f"matches {len(dead)} that no gradient reaches, such as {dead[0]}"
            remedy = "write the pattern so that it spares the segmenter's encoders (and memory that is not used)"
            problems.append(Problem(f"{field}[{i}]", pattern, rule, remedy))
        chosen |= found
    return chosen


def _no_gradient(model: AuroraModel) -> tuple[str, ...]:
    """Beginnings of the names of the segmenter's parameters that no gradient reaches."""
    return tuple(f"segmenter.{name}." for name in model.segmenter.no_gradient)


def _size(parameter: nn.Parameter) -> int:
    """Number of values, also where ZeRO-3 holds only a part of them here."""
    return getattr(parameter, "ds_numel", parameter.numel())


class SegRowEmbedding(nn.Embedding):
    """An embedding whose row of [SEG] is `seg_row` [D]; `weight` is shared with the embedding it replaces."""

    def __init__(self, base: nn.Embedding, token_id: int) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight = base.weight  # the same tensor, so that names in checkpoints stay and nothing is held twice
        self.token_id = token_id
        self.seg_row = nn.Parameter(base.weight[token_id].detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        words = F.embedding(input, self.weight)
        return torch.where((input == self.token_id)[..., None], self.seg_row, words)


class SegRowLinear(nn.Linear):
    """An lm_head whose row of [SEG] is `seg_row` [D]; `weight` is shared with the layer it replaces."""

    def __init__(self, base: nn.Linear, token_id: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.token_id = token_id
        self.seg_row = nn.Parameter(base.weight[token_id].detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        logits = F.linear(input, self.weight)
        own = F.linear(input, self.seg_row[None])  # [...,1]
        return torch.cat([logits[..., : self.token_id], own, logits[..., self.token_id + 1 :]], dim=-1)


def _train_seg_rows(language_model: PreTrainedModel, token_id: int) -> None:
    """Replace embedding and lm_head by the two layers above, in place."""
    language_model.set_input_embeddings(SegRowEmbedding(language_model.get_input_embeddings(), token_id))
    language_model.set_output_embeddings(SegRowLinear(language_model.get_output_embeddings(), token_id))
