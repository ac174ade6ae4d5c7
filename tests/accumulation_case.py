"""Run by tests/test_accumulation.py: the gradient that the engine applies against the sum that plain torch makes.

    python -m tests.accumulation_case ZERO_STAGE:OFFLOAD:ACCUMULATION:OUTPUT[:ACCUMULATE_IN] ...

prints one JSON object: case -> component -> [|applied - true| / |true|, |applied| / |true|]. Reduction buckets are
smaller than lm_head, so that a backward reduces in several pieces. With ACCUMULATE_IN the run is in bf16, and the true
gradient is the float32 sum of the bf16 gradients of the micro-batches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from model.aurora.model import AuroraModel
from model.stages.base import SupervisedStage
from tests.aurora_cases import LORA, run_config, tiny_batch, tiny_model, tiny_sample
from tests.grpo_cases import RAGGED
from utils import distributed
from utils import engine as engines
from utils.ds import deepspeed
from utils.errors import leave

BUCKET = 5000
PARTS = {"lora": "lora_", "embed_tokens": "embed_tokens", "lm_head": "lm_head", "seg head": "text_hidden_fcs",
         "mask decoder": "mask_decoder"}  # fmt: skip
TRAINABLE = LORA.model_copy(
    update={"lora_dropout": 0.0, "seg_rows_only": False, "full": (r"model\.embed_tokens\.", r"lm_head\.")}
)


def settings(zero_stage: int, offload: bool, accumulation: int, accumulate_in: str | None) -> RunConfig:
    """AdamW whose first average is (1 - 0.9) times the gradient, without clipping."""
    sums = {"precision": "bf16", "accumulate_in": accumulate_in} if accumulate_in else {"precision": "fp32"}
    return run_config(
        trainable=TRAINABLE.model_dump() | {"mask_decoder": True},
        engine={"gradient_checkpointing": True, "zero_stage": zero_stage, "offload": offload,
                "accumulation": accumulation, "micro_batch": 1, **sums},
        optim={"warmup_steps": 0, "steps": 9, "clip_norm": 0.0},
    )  # fmt: skip


def build(config: RunConfig) -> AuroraModel:
    model = tiny_model(config.trainable)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
    return model.to(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)


def answers_loss(config: RunConfig, engine: nn.Module, number: int) -> Tensor:
    """Stage 1 and 2: the forward gives an AuroraOutput."""
    engine.train()
    stage = SupervisedStage(config, engine)
    return stage.loss(stage.prepare(tiny_batch(tiny_sample(3 * number)))).total


def group_loss(config: RunConfig, engine: nn.Module, number: int) -> Tensor:
    """Stage 3: the forward gives a GroupOutput."""
    model, batch = getattr(engine, "module", engine), tiny_batch(tiny_sample(3 * number))
    engine.eval()
    packed = model.pack_group(batch, [torch.tensor(answer) for answer in RAGGED[:2]], 2)
    output = engine(packed, model.encode(batch))
    return output.mask_logits.square().mean() - output.log_probs.sum()


LOSSES: dict[str, Callable[[RunConfig, nn.Module, int], Tensor]] = {"answers": answers_loss, "group": group_loss}


def true_gradient(config: RunConfig, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Mean over the micro-batches of all processes, summed by plain torch in one process."""
    model = build(config)
    count = config.engine.accumulation * distributed.world_size()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    for number in range(count):
        model.zero_grad()
        (loss(config, model, number) / count).backward()
        for name, parameter in named.items():
            if parameter.grad is not None:  # SAM's IoU head has none
                total[name] += parameter.grad.float()
    return total


def applied_gradient(config: RunConfig, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """What the engine's first optimiser step was given, read from AdamW's first average."""
    engine = engines.build_engine(build(config), config)
    for micro in range(config.engine.accumulation):
        engine.backward(loss(config, engine, micro * distributed.world_size() + distributed.rank()))
        engine.step()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = config.engine.zero_stage == 0
            average = (engine.optimizer.state.get(parameter, {}).get("exp_avg", torch.zeros_like(parameter)) if whole
                       else deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg"))  # fmt: skip
            found[name] = average.reshape(getattr(parameter, "ds_shape", parameter.shape)) / (1 - config.optim.betas[0])
    engine.destroy()
    return found


def compare(case: str) -> dict[str, list[float]]:
    zero_stage, offload, accumulation, output, *sums = case.split(":")
    config = settings(int(zero_stage), offload == "1", int(accumulation), sums[0] if sums else None)
    true, applied = (get(config, LOSSES[output]) for get in (true_gradient, applied_gradient))
    found = {}
    for part, text in PARTS.items():
        expected, got = (torch.cat([g.flatten() for n, g in grads.items() if text in n]) for grads in (true, applied))
        size = expected.norm()
        found[part] = [float((got - expected).norm() / size), float(got.norm() / size)]
    return found


def with_small_buckets(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """DeepSpeed's configuration with buckets that lm_head does not fit in."""

    def made(*arguments: Any) -> dict[str, Any]:
        values = make(*arguments)
        values["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
        return values

    return made


if __name__ == "__main__":
    distributed.start(threads=1)
    engines.deepspeed_config = with_small_buckets(engines.deepspeed_config)
    result = {case: compare(case) for case in sys.argv[1:]}
    if distributed.is_main():
        print(json.dumps(result))
    distributed.stop()
    leave(0)  # as run_command ends a process
