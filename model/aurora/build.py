"""From a run's configuration to the joint model, with what it trains chosen and its start loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import RunConfig
from model.aurora.adapters import MASK_DECODER, apply_trainable, freeze
from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.model import AuroraModel
from model.aurora.prompter import build_prompter
from model.aurora.sampling import read_generation_defaults
from model.aurora.trained import load_mask_decoder, load_trained, read_trained
from model.backbones.videollama2.weights import load_backbone
from model.segmenters.sam import build_segmenter
from utils.errors import ConfigError, Problem

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(
    config: RunConfig, tokenizer_size: int, seg_token_id: int, device: torch.device | str = "cpu"
) -> AuroraModel:
    """Build the model of a run: base, SAM, adapters, earlier weights, frozen parts.

    Stage eval loads `eval.checkpoint` with the trainable settings that are stored in it, and freezes everything. Stage
    sft starts from the teacher's weights or from `init_from`, as `sft.student_start` says, and takes the teacher's mask
    decoder and freezes it where `sft.freeze_mask_decoder` says so (paper section 3.1).

    Args:
        config: the run.
        tokenizer_size: length of the tokenizer, [SEG] included.
        seg_token_id: the id after the base's last token (151646 as released). Its row exists, untrained, in the
            released matrices of 152,064 rows, so nothing is resized. (The published code shrinks them to 151,647 rows,
            train_ds.py:242, which makes its checkpoints unfit for the base.)
        device: where the weights go.

    Returns:
        AuroraModel in train mode (eval mode for stage eval) with frozen components in eval mode.

    Raises:
        ConfigError: the matrices have no row for [SEG], or a pattern of `trainable` matches nothing.
        ValueError, RuntimeError, FileNotFoundError, WeightsError: weights are missing or do not fit.
    """
    dtype = PRECISION[config.engine.precision]
    backbone, _ = load_backbone(config.model.base, dtype, config.model.attention, device)
    _check_vocabulary(
        config, backbone.language_model.get_input_embeddings().num_embeddings, tokenizer_size, seg_token_id
    )
    segmenter = build_segmenter(config.model.sam_type, config.model.sam_image_size, config.model.sam_checkpoint)
    model = AuroraModel(
        backbone, segmenter, seg_token_id, prompter=build_prompter(config.model, backbone, dtype).to(device)
    )
    model.feature_cache = FeatureCache(
        config.data.feature_cache, Path(config.data.root) / ".features", lambda tower: tower_fingerprint(model, tower)
    )
    model.origin = config.model
    model.generation_defaults = read_generation_defaults(config.model.base)
    evaluated = read_trained(config.eval.checkpoint) if config.stage == "eval" and config.eval.checkpoint else None
    apply_trainable(model, evaluated.trainable if evaluated else config.trainable)
    if evaluated:
        load_trained(model, evaluated)
    elif start := _start(config):
        load_trained(model, start)
    if config.stage == "sft" and config.sft.freeze_mask_decoder and config.sft.teacher_checkpoint:
        load_mask_decoder(model, config.sft.teacher_checkpoint)
        freeze(model, MASK_DECODER)
    if config.stage == "eval":
        model.requires_grad_(False)
    backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing and config.stage != "eval")
    return model.to(device, dtype).train(config.stage != "eval")


def _start(config: RunConfig) -> str | None:
    """The light checkpoint whose weights a training stage starts from; None = the base."""
    if config.stage == "sft" and config.sft.student_start == "teacher":
        return config.sft.teacher_checkpoint
    return config.init_from


def _check_vocabulary(config: RunConfig, rows: int, tokenizer_size: int, seg_token_id: int) -> None:
    """[SEG] must be a token of the tokenizer and have a row in the matrices."""
    if not 0 <= seg_token_id < tokenizer_size:
        raise ValueError(f"[SEG] has id {seg_token_id}, outside the tokenizer's {tokenizer_size} tokens")
    if tokenizer_size > rows:
        raise ConfigError(
            [
                Problem(
                    "model.base",
                    config.model.base,
                    f"its embedding has {rows} rows, but the tokenizer with {config.model.seg_token} needs "
                    f"{tokenizer_size}: there is no spare row for [SEG]",
                    "pad embed_tokens and lm_head of the base by a row each (and vocab_size in config.json), or name "
                    "an unused token of its tokenizer as model.seg_token",
                )
            ]
        )
