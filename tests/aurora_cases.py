"""A tiny joint model with the fixture's random backbone, synthetic clips and a stand-in for the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import RunConfig, TrainableConfig
from model.aurora.features import FeatureCache
from model.aurora.model import AuroraModel
from model.aurora.trainable import apply_trainable
from model.backbones.videollama2.weights import load_backbone
from model.segmenters.sam import SamSegmenter, SamSizes, assemble_sam
from utils.types import VIDEO_PLACEHOLDER, Batch, Sample

BASE = Path(__file__).parent / "fixtures" / "videollama2_av_tiny"
SEG, STOP, VOCABULARY = 599, 598, 600
FRAMES, SAM_SIDE = 2, 32
SAM = SamSizes(
    encoder_width=16, encoder_depth=1, encoder_heads=2, global_blocks=(0,), patch_size=8, window_size=3,
    prompt_width=32, decoder_heads=4, decoder_mlp=32, iou_head_width=16, mask_channels=4,
)  # fmt: skip
LORA = TrainableConfig(
    lora_rank=2,
    lora_alpha=4.0,
    lora_dropout=0.5,
    lora_targets=(r"language_model\..*\.[qv]_proj$", r"audio_tower\..*\.[qv]_proj$", r"mask_decoder\..*\.[qv]_proj$"),
    full=(),
    seg_rows_only=True,
)
WHOLE = TrainableConfig(lora_rank=0, lora_targets=(), full=(r"language_model\.", r"mm_projector\."))
"""As the mini world trains."""


class StubTokenizer:
    """Ids spelled out, with the two tokens that the code names."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return {"<|im_end|>": STOP, "[SEG]": SEG}[tokens]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join({SEG: "[SEG]", STOP: "<|im_end|>"}.get(i, f"w{i}") for i in token_ids)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [21, 22, SEG, 23] if text == "It is [SEG]." else [20]


def tiny_segmenter(seed: int = 0) -> SamSegmenter:
    torch.manual_seed(seed)
    segmenter = SamSegmenter(assemble_sam(SAM, SAM_SIDE), SAM)
    for parameter in segmenter.parameters():
        nn.init.normal_(parameter, std=0.2)
    return segmenter


def tiny_model(trainable: TrainableConfig | None = None, seed: int = 0, cache: str = "none") -> AuroraModel:
    """Random SAM and [SEG] head by `seed`; the backbone is always the fixture's."""
    backbone, _ = load_backbone(BASE)
    model = AuroraModel(backbone, tiny_segmenter(seed), SEG, FeatureCache(cache))
    if trainable is not None:
        apply_trainable(model, trainable)
    return model


def stir(model: AuroraModel, seed: int) -> None:
    """Move every trainable parameter by noise, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def tiny_sample(row: int, answer: Sequence[int] = (5, 6, SEG, 7, STOP), prompt_length: int = 6) -> Sample:
    """Clip number `row`; every third row is a null row."""
    generator = torch.Generator().manual_seed(row)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    height, width = 20 + row % 3, 30
    masks = torch.rand(FRAMES, height, width, generator=generator) > (1.0 if row % 3 == 2 else 0.7)
    words = torch.randint(1, 500, (prompt_length,), generator=generator)
    return Sample(
        row=row, uid=f"clip{row}_dog_1", clip=f"clip{row}", split="train", class_name="dog",
        reference="the dog", kind="",
        pixel_values=noise(FRAMES, 3, 98, 98).clamp(-1, 1), sam_pixels=noise(FRAMES, 3, SAM_SIDE, SAM_SIDE),
        sam_size=(22, 32), fbank=5 * noise(40, 128), masks=masks,
        prompt_ids=torch.cat([words[:2], torch.tensor([VIDEO_PLACEHOLDER]), words[2:]]),
        answer_ids=torch.tensor(answer), teacher_ids=torch.tensor([8, SEG, 7, STOP]),
        video_key=f"clip{row}", audio_key=f"clip{row}",
    )  # fmt: skip


def tiny_batch(*samples: Sample) -> Batch:
    return Batch(
        samples=list(samples),
        pixel_values=torch.stack([s.pixel_values for s in samples]),
        sam_pixels=torch.stack([s.sam_pixels for s in samples]),
        fbank=torch.stack([s.fbank for s in samples]),
        masks=[s.masks for s in samples],
    )


def three_clips() -> Batch:
    """Unequal prompts and answers; the last answer has no [SEG], the last clip is a null row."""
    return tiny_batch(
        tiny_sample(0),
        tiny_sample(1, answer=(9, SEG, 4, 3, SEG, 7, 2, STOP), prompt_length=9),
        tiny_sample(2, answer=(9, 4, STOP), prompt_length=4),
    )


def run_config(stage: str = "teacher", **sections: object) -> RunConfig:
    """A valid configuration of the tiny model; `sections` replace whole sections or fields of RunConfig."""
    values: dict[str, object] = {
        "stage": stage,
        "model": {"base": str(BASE), "sam_image_size": SAM_SIDE},
        "trainable": WHOLE.model_dump() | {"mask_decoder": stage != "sft"},
        "data": {"answer": "reasoning" if stage == "sft" else "class", "cot": ("cot.jsonl",)},
        "engine": {"precision": "fp32", "gradient_checkpointing": False},
        "loss": {"bce": 2.0, "dice": 0.5, "distill": 1.0 if stage == "sft" else 0.0},
        "sft": {"teacher_checkpoint": "teacher"} if stage == "sft" else {},
    }
    return RunConfig.model_validate(values | sections)
