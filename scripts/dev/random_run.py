"""A stage run with random weights on clips of noise at the real shapes: what `scripts/bench_gpu.py` measures."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from configs.schema import RunConfig
from model.aurora.build import build_meta_model
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.stages import build_stage
from scripts.plan_memory import Workload, fbank_frames
from utils.engine import build_engine
from utils.types import VIDEO_PLACEHOLDER, Batch, Sample


def random_model(config: RunConfig, device: torch.device) -> AuroraModel:
    """The joint model of a run with small random weights on `device`."""
    model = build_meta_model(config).to_empty(device=device)
    model.backbone.reset_buffers(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "rotary" not in name:
                buffer.normal_(generator=generator)
    return model


def random_batch(model: AuroraModel, work: Workload) -> Batch:
    """Clips of noise at the real shapes, with prompts and answers of the real lengths."""
    generator = torch.Generator().manual_seed(0)
    sizes, side, seg = model.backbone.media_format, model.segmenter.image_size, model.seg_token_id
    height, width = work.frame_size
    scale = side / max(height, width)
    frames = fbank_frames(work.audio_seconds)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def words(count: int) -> Tensor:
        return torch.randint(1, seg, (count,), generator=generator)

    stop = BenchTokenizer(seg).convert_tokens_to_ids("<|im_end|>")
    samples = []
    for i in range(work.clips):
        prompt = torch.cat([words(work.prompt_tokens - 20), torch.tensor([VIDEO_PLACEHOLDER]), words(20)])
        answer = torch.cat([words(work.answer_tokens - 2), torch.tensor([seg, stop])])
        samples.append(Sample(
            row=i, uid=f"clip_{i}_1", clip=f"clip_{i}", split="train", class_name="dog", reference="", kind="",
            pixel_values=noise(work.frames, 3, sizes.frame_size, sizes.frame_size).clamp(-1, 1),
            sam_pixels=noise(work.frames, 3, side, side), sam_size=(round(height * scale), round(width * scale)),
            fbank=5 * noise(frames, sizes.mel_bins),
            masks=torch.rand(work.frames, height, width, generator=generator) > 0.8, prompt_ids=prompt,
            answer_ids=answer, teacher_ids=torch.cat([words(10), torch.tensor([seg, stop])]), video_key=str(i),
            audio_key=str(i),
        ))  # fmt: skip
    stacked = (torch.stack([getattr(s, name) for s in samples]) for name in ("pixel_values", "sam_pixels", "fbank"))
    return Batch(samples, *stacked, [s.masks for s in samples])


class BenchTokenizer:
    """Ids spelled out: random weights write no words."""

    def __init__(self, seg: int) -> None:
        self.ids = {"[SEG]": seg, "<|im_end|>": seg - 1}

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return self.ids[tokens]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def train(model: AuroraModel, batch: Batch, config: RunConfig, steps: int) -> tuple[int, float]:
    """Optimiser steps of the stage through the engine; (clips, seconds) of all but the first."""
    engine = build_engine(model, config)
    engine.train()
    stage = build_stage(config, engine, BenchTokenizer(model.seg_token_id))
    began = time.perf_counter()
    for step in range(steps):
        if step == 1:
            began = now()
        for _ in range(config.engine.accumulation):
            loss = stage.loss(stage.prepare(batch))
            engine.backward(loss.total)
            engine.step()
    seconds = now() - began
    engine.destroy()
    return (steps - 1) * config.engine.accumulation * len(batch), seconds


def infer(model: AuroraModel, batch: Batch, config: RunConfig, steps: int) -> tuple[int, float]:
    """Answers of full length with their masks; (clips, seconds) of all but the first."""
    began = time.perf_counter()
    for step in range(steps):
        if step == 1:
            began = now()
        predict(model, batch, BenchTokenizer(model.seg_token_id), config.eval.max_new_tokens)
    return (steps - 1) * len(batch), now() - began


def now() -> float:
    """The clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
