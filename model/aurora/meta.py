"""The joint model without weights, on torch's meta device: for plans, checks of names and shapes, conversions."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import RunConfig
from model.aurora.adapters import MASK_DECODER, apply_trainable, freeze
from model.aurora.build import PRECISION
from model.aurora.model import AuroraModel
from model.aurora.prompter import build_prompter
from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import CONFIG_NAME, RELEASED, VideoLlama2Config
from model.segmenters.sam import build_segmenter

RELEASED_SEG_ID = 151646
"""Id of [SEG] on the released tokenizer: the first after its 151,646 tokens."""


def sizes_of_base(config: RunConfig) -> tuple[VideoLlama2Config, str]:
    """Sizes of `model.base` and where they come from; those of the 7B release where the folder is not there."""
    if (Path(config.model.base) / CONFIG_NAME).is_file():
        return VideoLlama2Config.from_folder(config.model.base), str(Path(config.model.base) / CONFIG_NAME)
    return RELEASED, f"the released 7B model ({config.model.base} is not there)"


def build_meta_model(
    config: RunConfig, sizes: VideoLlama2Config | None = None, seg_token_id: int | None = None
) -> AuroraModel:
    """As `model.aurora.build.build_model`, but nothing is read or allocated.

    Args:
        config: the run.
        sizes: of the backbone; None = `sizes_of_base`.
        seg_token_id: None = the released one, or the last row of a smaller vocabulary.

    Raises:
        ConfigError: SAM's type or size is wrong, or a pattern of `trainable` matches nothing.
    """
    sizes = sizes_of_base(config)[0] if sizes is None else sizes
    if seg_token_id is None:
        seg_token_id = min(RELEASED_SEG_ID, sizes.language.vocab_size - 1)
    with torch.device("meta"):
        backbone = VideoLlama2(sizes, config.model.attention)
        segmenter = build_segmenter(config.model.sam_type, config.model.sam_image_size)
        prompter = build_prompter(config.model, backbone, PRECISION[config.engine.precision])
        model = AuroraModel(backbone, segmenter, seg_token_id, prompter=prompter)
        model.to(PRECISION[config.engine.precision])
        apply_trainable(model, config.trainable)
    if config.stage == "sft" and config.sft.freeze_mask_decoder and config.sft.teacher_checkpoint:
        freeze(model, MASK_DECODER)
    if config.stage == "eval":
        model.requires_grad_(False)
    backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing and config.stage != "eval")
    model.to(PRECISION[config.engine.precision])
    return model.train(config.stage != "eval")
