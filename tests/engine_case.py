"""Run by tests/test_stages.py in a process of its own: a stage through DeepSpeed against the bare model.

    python -m tests.engine_case STAGE ZERO_STAGE PRECISION TEACHER_FOLDER

Prints one JSON object: losses of both and the largest difference between their parameters after three steps.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from configs.schema import RunConfig
from model.aurora.model import AuroraModel
from model.aurora.trainable import MASK_DECODER, freeze
from model.aurora.trained import load_mask_decoder, load_trained, save_trained
from model.stages import build_stage
from tests.aurora_cases import LORA, run_config, three_clips, tiny_model
from utils import distributed
from utils.engine import build_engine, trainable_state

STEPS = 3


def build(config: RunConfig) -> AuroraModel:
    model = tiny_model(config.trainable)
    if config.stage == "sft":
        load_mask_decoder(model, config.sft.teacher_checkpoint)
        freeze(model, MASK_DECODER)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
    return model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32).train()


def train_bare(config: RunConfig) -> tuple[list[float], AuroraModel]:
    """The same three steps with torch alone."""
    model = build(config)
    stage, losses = build_stage(config, model), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=config.optim.betas, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = config.optim.lr * (1 - step / STEPS)
        loss = stage.loss(stage.prepare(three_clips()))
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
        loss = stage.loss(stage.prepare(three_clips()))
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


def main(stage: str, zero_stage: str, precision: str, folder: str) -> None:
    distributed.start(threads=1)
    trainable = LORA.model_copy(update={"lora_dropout": 0.0, "mask_decoder": stage != "sft"})
    sections: dict[str, object] = {
        "trainable": trainable.model_dump(),
        "engine": {"micro_batch": 3, "accumulation": 1, "zero_stage": int(zero_stage), "precision": precision},
        "optim": {"lr": 1e-3, "warmup_steps": 0, "steps": STEPS},
        "output_dir": folder,
    }
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
