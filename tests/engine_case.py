"""Run by tests/test_stages.py in a process of its own: a stage through DeepSpeed against the bare model.

    python -m tests.engine_case STAGE ZERO_STAGE PRECISION TEACHER_FOLDER [MEMORY]

With MEMORY (model.sam_memory) the segmenter is SAM 2, and its memory is trained too.
Prints one JSON object: losses of both and the largest difference between their parameters after three steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from configs.schema import RunConfig
from model.aurora.model import AuroraModel
from model.aurora.trainable import MASK_DECODER, apply_trainable, freeze
from model.aurora.trained import load_mask_decoder, load_trained, save_trained
from model.backbones.videollama2.weights import load_backbone
from model.segmenters.sam2 import build_sam2
from model.stages import build_stage
from tests.aurora_cases import BASE, LORA, SEG, run_config, three_clips, tiny_model
from tests.sam2_cases import clips, save_sam2, settings
from utils import distributed
from utils.engine import build_engine, trainable_state
from utils.types import Batch

STEPS = 3


def build(config: RunConfig) -> AuroraModel:
    if config.model.segmenter == "sam2":
        torch.manual_seed(0)
        model = AuroraModel(load_backbone(BASE)[0], build_sam2(config.model), SEG)
        apply_trainable(model, config.trainable)
    else:
        model = tiny_model(config.trainable)
    if config.stage == "sft":
        load_mask_decoder(model, config.sft.teacher_checkpoint)
        freeze(model, MASK_DECODER)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
    return model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32).train()


def batch(config: RunConfig) -> Batch:
    return clips() if config.model.segmenter == "sam2" else three_clips()


def train_bare(config: RunConfig) -> tuple[list[float], AuroraModel]:
    """The same three steps with torch alone."""
    model = build(config)
    stage, losses = build_stage(config, model), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=config.optim.betas, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = config.optim.lr * (1 - step / STEPS)
        loss = stage.loss(stage.prepare(batch(config)))
        optimizer.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        optimizer.step()
        losses.append(loss.total.item())
    return losses, model


def train_engine(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Through DeepSpeed; the light checkpoint that it writes must hold the trained state."""
    engine = build_engine(build(config), config)
    stage, losses = build_stage(config, engine), []
    for _ in range(STEPS):
        loss = stage.loss(stage.prepare(batch(config)))
        engine.backward(loss.total)
        engine.step()
        losses.append(loss.total.item())
    state = trainable_state(engine)
    folder = f"{config.sft.teacher_checkpoint or config.output_dir}/saved"
    save_trained(stage.model, folder)
    again = build(config)
    load_trained(again, folder)
    if not all(torch.equal(again.get_parameter(name), value) for name, value in state.items()):
        raise RuntimeError("the light checkpoint differs from the engine's state")
    engine.destroy()
    return losses, state


def main(stage: str, zero_stage: str, precision: str, folder: str, memory: str | None = None) -> None:
    distributed.start(threads=1)
    trainable = LORA.model_copy(update={"lora_dropout": 0.0, "mask_decoder": stage != "sft"})
    sections: dict[str, object] = {
        "trainable": trainable.model_dump(),
        "engine": {"micro_batch": 3, "accumulation": 1, "zero_stage": int(zero_stage), "precision": precision},
        "optim": {"lr": 1e-3, "warmup_steps": 0, "steps": STEPS},
        "output_dir": folder,
    }
    if memory is not None:
        sam2 = settings(save_sam2(Path(folder) / "sam2"), sam_memory=memory)
        sections["model"] = sam2.model_copy(update={"base": str(BASE)}).model_dump()
        sections["trainable"] = trainable.model_copy(update={"full": (r"sam\.memory_attention\.",)}).model_dump()
    if stage == "sft":
        sections["sft"] = {"teacher_checkpoint": folder}
    config = run_config(stage, **sections)
    bare, model = train_bare(config)
    losses, state = train_engine(config)
    apart = max((state[n].float() - p.float()).abs().max().item() for n, p in model.named_parameters() if n in state)
    print(json.dumps({"bare": bare, "engine": losses, "apart": apart}))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
