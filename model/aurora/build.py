"""From a run's configuration to the joint model, with what it trains chosen and its start loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs.schema import ModelConfig, RunConfig
from model.aurora.ablations import LearnableQueryAurora, TextEncoderAurora, load_text_encoder
from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.model import AuroraModel
from model.aurora.sampling import read_generation_defaults
from model.aurora.trainable import MASK_DECODER, apply_trainable, freeze
from model.aurora.trained import load_mask_decoder, load_trained, read_trained
from model.backbones import qwen_omni
from model.backbones.base import Backbone
from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.config import CONFIG_NAME, RELEASED, VideoLlama2Config
from model.backbones.videollama2.weights import KeyCheck, check_folder, export_state, load_backbone
from model.segmenters.base import Segmenter
from model.segmenters.sam import build_segmenter
from model.segmenters.sam2 import build_sam2
from utils.errors import ConfigError, Problem
from utils.tensor_files import read_json

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}

RELEASED_SEG_ID = 151646
"""Id of [SEG] on the released tokenizer: the first after its 151,646 tokens."""


class BackboneKind(NamedTuple):
    """How a backbone is made."""

    load: Callable[..., tuple[Backbone, Any]]  # (folder, dtype, attention, device) -> it in eval mode, a report
    make: Callable[..., Backbone]  # (sizes, attention) -> it with random weights
    read_sizes: Callable[[str], Any]  # (folder) -> sizes
    released: dict[str, Any]  # name of a released folder -> its sizes
    check: Callable[[Any, str], list[KeyCheck]]  # (sizes, folder) -> what becomes of each stored or expected name
    save: Callable[..., Any]  # (sizes, state dict without adapters, folder, name of its type): a folder to load


BACKBONES = {
    "videollama2_qwen2": BackboneKind(
        load_backbone,
        VideoLlama2,
        VideoLlama2Config.from_folder,
        {"VideoLLaMA2.1-7B-AV": RELEASED},
        check_folder,
        export_state,
    )
}
OMNI = BackboneKind(
    qwen_omni.load_backbone,
    qwen_omni.QwenOmni,
    qwen_omni.OmniConfig.from_folder,
    {f"Qwen2.5-Omni-{size.upper()}": qwen_omni.released_config(size) for size in ("7b", "3b")},
    qwen_omni.check_folder,
    qwen_omni.export_state,
)
BACKBONES |= dict.fromkeys(qwen_omni.MODEL_TYPES, OMNI)
"""By `model_type` in config.json of `model.base`; a folder that names none holds the first."""
SEGMENTERS: dict[str, Callable[[ModelConfig, bool], Segmenter]] = {
    "sam": lambda m, weights: build_segmenter(m.sam_type, m.sam_image_size, m.sam_checkpoint if weights else None),
    "sam2": build_sam2,
}
"""By `model.segmenter`: (settings, whether weights are read) -> it in float32 and eval mode."""


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
            released matrices of 152,064 rows, so nothing is resized. (The released code shrinks them to 151,647 rows,
            train_ds.py:242, which makes its checkpoints unfit for the base.)
        device: where the weights go.

    Returns:
        AuroraModel in train mode (eval mode for stage eval) with frozen components in eval mode.

    Raises:
        ConfigError: the matrices have no row for [SEG], or a pattern of `trainable` matches nothing.
        ValueError, RuntimeError, FileNotFoundError, WeightsError: weights are missing or do not fit.
    """
    dtype = PRECISION[config.engine.precision]
    backbone, _ = backbone_kind(config.model.base).load(config.model.base, dtype, config.model.attention, device)
    _check_vocabulary(config, backbone.words.num_embeddings, tokenizer_size, seg_token_id)
    model = _assemble(config.model, backbone, build_sam(config.model), seg_token_id, dtype)
    model.feature_cache = FeatureCache(
        config.data.feature_cache, Path(config.data.root) / ".features", lambda tower: tower_fingerprint(model, tower)
    )
    model.origin = config.model
    model.generation_defaults = read_generation_defaults(config.model.base)
    start = _start(config)
    stored = None if start is None else read_trained(start)
    apply_trainable(model, stored.trainable if stored and config.stage == "eval" else config.trainable)
    if stored:
        load_trained(model, stored)
    if _takes_decoder(config):
        load_mask_decoder(model, config.sft.teacher_checkpoint)
    return _finish(model, config).to(device, dtype)


def build_meta_model(config: RunConfig, sizes: Any = None, seg_token_id: int | None = None) -> AuroraModel:
    """As `build_model` on torch's meta device: nothing is read or allocated; for plans, checks and conversions.

    Args:
        config: the run.
        sizes: of the backbone; None = `sizes_of_base`.
        seg_token_id: None = the released one, or the last row of a smaller vocabulary.

    Raises:
        ConfigError: SAM's type or size is wrong, or a pattern of `trainable` matches nothing.
    """
    sizes = sizes_of_base(config)[0] if sizes is None else sizes
    dtype = PRECISION[config.engine.precision]
    with torch.device("meta"):
        backbone = backbone_kind(config.model.base).make(sizes, config.model.attention)
        seg = min(RELEASED_SEG_ID, backbone.words.num_embeddings - 1) if seg_token_id is None else seg_token_id
        segmenter = build_sam(config.model, weights=False)
        model = _assemble(config.model, backbone, segmenter, seg, dtype).to(dtype)
        apply_trainable(model, config.trainable)
    return _finish(model, config).to(dtype)


def backbone_kind(folder: str) -> BackboneKind:
    """The kind of a base's folder; where there is no such folder, that of its name, or the first of `BACKBONES`.

    Raises:
        ConfigError: the folder holds another kind of model.
    """
    path, first = Path(folder) / CONFIG_NAME, next(iter(BACKBONES))
    if not path.is_file():
        return next((kind for kind in BACKBONES.values() if Path(folder).name in kind.released), BACKBONES[first])
    name = read_json(path).get("model_type", first)
    if name not in BACKBONES:
        remedy = f"name the folder of one of {', '.join(BACKBONES)}"
        raise ConfigError([Problem("model.base", folder, f"{CONFIG_NAME} says model_type {name!r}", remedy)])
    return BACKBONES[name]


def build_sam(config: ModelConfig, weights: bool = True) -> Segmenter:
    """The segmenter that `model.segmenter` names; without weights its values are random."""
    return SEGMENTERS[config.segmenter](config, weights)


def sizes_of_base(config: RunConfig) -> tuple[Any, str]:
    """Sizes of `model.base` and where they come from; those of the released model where the folder is not there."""
    kind, path = backbone_kind(config.model.base), Path(config.model.base) / CONFIG_NAME
    if path.is_file():
        return kind.read_sizes(config.model.base), str(path)
    sizes = kind.released.get(Path(config.model.base).name) or next(iter(kind.released.values()))
    return sizes, f"the released model ({config.model.base} is not there)"


def _assemble(
    config: ModelConfig, backbone: Backbone, segmenter: Segmenter, seg_token_id: int, dtype: torch.dtype
) -> AuroraModel:
    """The class that `model.prompter` names."""
    parts = backbone, segmenter, seg_token_id
    if config.prompter == "learnable_tokens":
        return LearnableQueryAurora(*parts, count=config.learnable_tokens)
    if config.prompter == "text_encoder":
        encoder = None if config.text_encoder is None else load_text_encoder(config.text_encoder, dtype)
        return TextEncoderAurora(*parts, encoder=encoder)
    return AuroraModel(*parts)


def _takes_decoder(config: RunConfig) -> bool:
    """Whether the run takes the mask decoder of its teacher and freezes it (paper section 3.1)."""
    return bool(config.stage == "sft" and config.sft.freeze_mask_decoder and config.sft.teacher_checkpoint)


def _finish(model: AuroraModel, config: RunConfig) -> AuroraModel:
    """Frozen as the stage wants it, in its mode."""
    training = config.stage != "eval"
    if _takes_decoder(config):
        freeze(model, MASK_DECODER)
    if not training:
        model.requires_grad_(False)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing and training)
    return model.train(training)


def _start(config: RunConfig) -> str | None:
    """The light checkpoint whose weights a stage starts from; None = the base."""
    if config.stage == "eval":
        return config.eval.checkpoint
    if config.stage == "sft" and config.sft.student_start == "teacher":
        return config.sft.teacher_checkpoint
    return config.init_from


def _check_vocabulary(config: RunConfig, rows: int, tokenizer_size: int, seg_token_id: int) -> None:
    """[SEG] must be a token of the tokenizer and have a row in the matrices."""
    if not 0 <= seg_token_id < tokenizer_size:
        raise ValueError(f"[SEG] has id {seg_token_id}, outside the tokenizer's {tokenizer_size} tokens")
    if tokenizer_size > rows:
        rule = (
            f"its embedding has {rows} rows, but the tokenizer with {config.model.seg_token} needs {tokenizer_size}: "
            "there is no spare row for [SEG]"
        )
        remedy = (
            "pad embed_tokens and lm_head of the base by a row each (and vocab_size in config.json), or name an unused "
            "token of its tokenizer as model.seg_token"
        )
        raise ConfigError([Problem("model.base", config.model.base, rule, remedy)])
