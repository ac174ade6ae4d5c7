"""DeepSpeed, the one engine of every stage: parameter groups, AdamW, schedule, ZeRO, precision."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from configs.schema import EngineConfig, OptimConfig, RunConfig
from utils.ds import deepspeed
from utils.errors import ConfigError, Problem


class LearningRate:
    """Factor on the learning rate at optimiser step `step` (0-based): linear warm-up, then decay to 0 at `decay_steps`.

    | paper | released code | here | why |
    |---|---|---|---|
    | no schedule (4.1) | WarmupDecayLR spends its first step at a rate of 0 (train_ds.py:337) | step 0 has 1 / warmup_steps | no step is wasted |
    | 500 steps of GRPO, 720 and 300 of SFT | decays over 4,000 (train_ds.py:339) and 3,600 (train_ds_test.py:312) | `optim.decay_steps`: as released in the paper's configurations, else the length of the run | the paper is silent |
    """  # noqa: E501 (a table)

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    def __call__(self, step: int) -> float:
        c = self.config
        if step < c.warmup_steps:
            return (step + 1) / c.warmup_steps
        horizon = c.steps if c.decay_steps is None else c.decay_steps
        progress = min(1.0, (step - c.warmup_steps) / max(1, horizon - c.warmup_steps))
        if c.schedule == "linear":
            return 1.0 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if c.schedule == "cosine" else 1.0


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal learning rate.

    Args:
        named: (name, parameter) pairs; frozen ones are skipped.
        config: `group_lr_scale` maps regexes (searched in the name, first match counts) to factors on `lr`.

    Raises:
        ConfigError: if a regex matches no trainable parameter, or nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trainable:
        raise ConfigError([Problem("trainable", "no parameter", "nothing is trained", "see the section trainable")])
    rates = {pattern: config.lr * factor for pattern, factor in config.group_lr_scale.items()}
    members: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in ("", *rates)}
    for name, parameter in trainable:
        members[next((pattern for pattern in rates if re.search(pattern, name)), "")].append(parameter)
    idle = [pattern for pattern in rates if not members[pattern]]
    if idle:
        rule, remedy = "matches no trainable parameter", f"compare with a name such as {trainable[0][0]}"
        raise ConfigError([Problem("optim.group_lr_scale", pattern, rule, remedy) for pattern in idle])
    return [{"params": ps, "lr": rates.get(pattern, config.lr)} for pattern, ps in members.items() if ps]


def build_engine(model: nn.Module, config: RunConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` (its trainable parameters already chosen) with AdamW, schedule, ZeRO and precision of `config`.

    Calls on the engine (`engine(...)`, `engine.encode(...)`) reach the model; float32 buffers stay float32 under bf16.

    Raises:
        ConfigError: see `parameter_groups`.
    """
    optim = config.optim
    groups = parameter_groups(model.named_parameters(), optim)
    optimizer = torch.optim.AdamW(groups, optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    settings = deepspeed_config(config.engine, optim)
    if config.engine.zero_stage == 0 and config.engine.precision == "fp32":
        # Here DeepSpeed clips without telling the norm, so both are done before the optimiser's step.
        settings["gradient_clipping"] = 0.0
        optimizer.register_step_pre_hook(_ClipAndMeasure(optim.clip_norm))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: LambdaLR(wrapped, LearningRate(optim)),
        config=settings,
        dist_init_required=False,
    )
    return engine


class _ClipAndMeasure:
    """Clips the gradient to a norm (0 = not) and notes the norm before clipping as `optimizer.gradient_norm`.

    A gradient that is not finite is dropped, as ZeRO drops it: the weights stay as they were when it was made.
    """

    def __init__(self, clip_norm: float) -> None:
        self.clip_norm = clip_norm or math.inf

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.gradient_norm = norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if not bool(norm.isfinite()):
            for parameter in parameters:
                parameter.grad = None


def deepspeed_config(engine: EngineConfig, optim: OptimConfig) -> dict[str, Any]:
    """DeepSpeed's own JSON configuration."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage >= 2:
        zero |= {"overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True, "reduce_scatter": True}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": optim.clip_norm,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # else CPUAdam is compiled at the first start
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if engine.accumulate_in == "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def trainable_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """Copies of all trainable parameters on the CPU, whole on every rank (gathered one by one under ZeRO-3)."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the last optimiser step's gradient before clipping (over all parameters and ranks)."""
    norm = engine.get_global_grad_norm()
    return float(engine.optimizer.gradient_norm if norm is None else norm)  # None: see `_ClipAndMeasure`
