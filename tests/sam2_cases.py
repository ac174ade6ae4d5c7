"""A tiny SAM 2 with random weights, in memory or as a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Sam2VideoConfig, Sam2VideoModel

from configs.schema import ModelConfig
from model.segmenters.sam2 import Sam2Segmenter, build_sam2
from tests.aurora_cases import three_clips
from utils.types import Batch

SIDE, WIDTH, GRID = 64, 128, 4


def sam2_config(**changes: Any) -> Sam2VideoConfig:
    """1.4 M parameters; memories are 64 wide, as the library hard-codes, and a pointer is two memory tokens."""
    hiera = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8], "blocks_per_stage": [1, 1, 2, 1], "num_attention_heads": 1,
        "global_attention_blocks": [3], "window_size_per_stage": [8, 4, 8, 4], "image_size": [SIDE, SIDE],
        "window_positional_embedding_background_size": [7, 7],
    }  # fmt: skip
    return Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model", "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": WIDTH,
            "backbone_feature_sizes": [[SIDE // s] * 2 for s in (4, 8, 16)], "backbone_config": hiera,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": WIDTH, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
            "dynamic_multimask_via_stability": False,
        },
        **{
            "image_size": SIDE, "num_maskmem": 4, "memory_attention_hidden_size": WIDTH,
            "memory_attention_num_layers": 2, "memory_attention_feed_forward_hidden_size": 64,
            "memory_attention_rope_feat_sizes": [GRID, GRID], "memory_encoder_hidden_size": WIDTH,
            "mask_downsampler_embed_dim": WIDTH, "memory_fuser_embed_dim": WIDTH, "memory_fuser_intermediate_dim": 64,
            "multimask_output_in_sam": False,
        } | changes,
    )  # fmt: skip


def tiny_sam2(seed: int = 0, **changes: Any) -> Sam2VideoModel:
    """Every parameter drawn wide enough that masks, memories and scores differ."""
    torch.manual_seed(seed)
    sam = Sam2VideoModel(sam2_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15 if "vision_encoder" in name else 0.1)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.05)
        sam.memory_temporal_positional_encoding.normal_()
        sam.no_memory_embedding.normal_()
    return sam


def tiny_segmenter2(memory: str = "none", seed: int = 0, **options: Any) -> Sam2Segmenter:
    return Sam2Segmenter(tiny_sam2(seed), memory, **options)


def save_sam2(folder: Path, seed: int = 0) -> Path:
    """The folder of a released SAM 2, tiny."""
    tiny_sam2(seed).save_pretrained(folder)
    return folder


def settings(folder: Path, side: int = SIDE, **options: Any) -> ModelConfig:
    return ModelConfig(segmenter="sam2", sam_checkpoint=str(folder), sam_image_size=side, **options)


def load_sam2(folder: Path, side: int = SIDE, **options: Any) -> Sam2Segmenter:
    return build_sam2(settings(folder, side, **options))


def clips() -> Batch:
    """The three clips with frames for SAM 2; objects are squares that its frames show."""
    batch = three_clips()
    frames = torch.zeros(3, 2, 3, SIDE, SIDE)
    for clip, masks in enumerate(batch.masks):
        masks.zero_()
        masks[:, 4:14, 5 + 5 * clip : 15 + 5 * clip] = True
        frames[clip, :, :, 12:44, 10 + 10 * clip : 32 + 10 * clip] = 2.0
    samples = [replace(s, sam_pixels=x, sam_size=(SIDE, SIDE)) for s, x in zip(batch.samples, frames, strict=True)]
    return replace(batch, samples=samples, sam_pixels=frames)


def saved_by_a_frame(memory: str, trained: bool) -> float:
    """Maps of 256 channels that a frame of the released large model saves for backward, on the meta device and without
    attention matrices (fused kernels keep none)."""
    half = torch.bfloat16
    with torch.device("meta"):
        segmenter = build_sam2(settings(Path("nowhere"), 512, sam_memory=memory), weights=False).to(half)
        segmenter.requires_grad_(False).sam.mask_decoder.requires_grad_(trained)
        track = segmenter.track(torch.zeros(1, 256, dtype=half, requires_grad=True), 10)
        cells, track.seen = segmenter.grid**2, 9
        if memory != "none":
            track.memories = {t: torch.zeros(cells, 1, 64, dtype=half).requires_grad_() for t in (0, *range(3, 9))}
            track.pointers = {t: torch.zeros(1, 256, dtype=half).requires_grad_() for t in range(9)}
        images, row = torch.zeros(1, segmenter.feature_size, dtype=half), torch.zeros(1, dtype=torch.long)
    known = {StorageWeakRef(x.untyped_storage()) for x in (*segmenter.parameters(), images)}
    saved: dict[StorageWeakRef, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        is_scores = x.dim() >= 3 and x.shape[-2] == cells and x.shape[-1] in (cells, 7 * cells + 36)
        storage = StorageWeakRef(x.untyped_storage())
        if storage not in known and not is_scores:
            saved[storage] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        patch.setattr("model.segmenters.sam2.checkpoint", lambda run, *inputs, **_: run(*inputs))
        segmenter.step(track, images, row)
    return sum(saved.values()) / half.itemsize / (256 * cells)


if __name__ == "__main__":
    print(json.dumps([(m, t, saved_by_a_frame(m, t)) for m in ("none", "every") for t in (False, True)]))
