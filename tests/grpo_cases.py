"""Rollouts with given answers, and the processes that tests/test_grpo.py starts.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.grpo_cases ZERO_STAGE...

prints one JSON object: stage -> case -> losses of all processes and whether their weights agree after its steps.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.schema import RunConfig, TrainableConfig
from model.aurora import generation
from model.objectives.policy import GroupAdvantages
from model.objectives.rewards import Judged
from model.stages import grpo
from model.stages.grpo import GrpoStage, Rollouts
from tests.aurora_cases import LORA, SEG, STOP, StubTokenizer, run_config, tiny_batch, tiny_model, tiny_sample
from utils import distributed
from utils.errors import leave
from utils.types import Batch, Generation

RAGGED = ([5, 6, SEG, 7, STOP], [9, SEG], [8, 4, 3], [2, SEG, 4, SEG, 7, 6, 11, STOP], [STOP], [3, 5, SEG, STOP])
"""Three answers for each of two clips: one [SEG], [SEG] last, cut off without [SEG], two [SEG], nothing, short."""


def length_reward(answer: Judged) -> float:
    """Tells the answers of a group apart."""
    return answer.tokens / 4


def right_token(answer: Judged) -> float:
    """The bandit's: word 10 is right about even rows, word 20 about odd ones."""
    return float(answer.text == ("w10", "w20")[answer.sample.row % 2])


def grpo_config(trainable: TrainableConfig = LORA, checkpointing: bool = False, **options: object) -> RunConfig:
    settings = {
        "group_size": 3, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": 8,
        "reward_module": "tests.grpo_cases:length_reward",
        "reward_weights": {"format": 1.0, "iou": 1.0, "class": 1.0, "length_reward": 1.0},
    }  # fmt: skip
    return run_config(
        "grpo",
        init_from="sft",
        trainable=trainable.model_dump() | {"mask_decoder": options.get("mask_loss_on") != "none"},
        model=run_config().model.model_dump() | {"decode_frames_per_step": 1},
        engine={"precision": "fp32", "gradient_checkpointing": checkpointing, "zero_stage": 2},
        loss={"ce": 0.0, "bce": 2.0, "dice": 0.5, "distill": 0.0},
        grpo=settings | options,
    )


def make_stage(config: RunConfig, seed: int = 0) -> GrpoStage:
    model = tiny_model(config.trainable, seed)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
    return GrpoStage(config, model.train(), StubTokenizer())


def two_clips() -> Batch:
    return tiny_batch(tiny_sample(0), tiny_sample(1, prompt_length=9))


def given(answers: Sequence[Sequence[int]], width: int) -> Generation:
    """These answers as if they had been drawn; the [SEG] states are noise, which only the IoU reward reads."""
    ids = [torch.tensor(answer) for answer in answers]
    asking = torch.tensor([i for i, answer in enumerate(answers) if SEG in answer], dtype=torch.long)
    texts = [StubTokenizer().decode([t for t in answer if t != STOP]) for answer in answers]
    seg_hidden = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(3))[asking]
    truncated = torch.tensor([answer[-1] != STOP for answer in answers])
    return Generation(ids, texts, seg_hidden, asking, truncated, [torch.zeros(len(x)) for x in ids])


def draw_ragged(monkeypatch: pytest.MonkeyPatch) -> Generation:
    """Two clips, three ragged answers each, put in the place of sampling."""
    answers = given(RAGGED, 64)
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: answers)
    return answers


def with_advantages(prepared: Rollouts) -> Rollouts:
    """Advantages of both signs, different for every answer."""
    values = torch.tensor([1.0, -0.5, -0.7, 0.3, -1.2, 0.8])
    return replace(prepared, advantages=GroupAdvantages(values, *prepared.advantages[1:]))


def _draw(rule: str, rank: int) -> object:
    """A stand-in for `Sampling.draw`: the words of a degenerate case."""
    steps = iter(range(10**6))

    def draw(self: generation.Sampling, log_probs: Tensor) -> Tensor:
        step, rows = next(steps), len(log_probs)
        if rule == "one process ends early" and rank == 0:
            return torch.full((rows,), STOP)
        if rule == "seg in one process" and rank == 1 and step == 1:
            return torch.full((rows,), SEG)
        if rule == "all cut off":
            return torch.arange(rows) + 10
        return torch.arange(rows) % 2 * 10 + 10 + step if step < 3 + rank else torch.full((rows,), STOP)

    return draw


CASES: dict[str, dict[str, object]] = {
    "one process ends early": {"updates_per_batch": 2},
    "no seg at all": {"mask_loss_on": "best"},
    "seg in one process": {"mask_loss_on": "all"},
    "equal rewards": {"reward_module": None, "reward_weights": {"format": 1.0}},
    "all cut off": {"mask_truncated": True, "normalisation": "token"},
}


def degenerate(zero_stage: int) -> dict[str, object]:
    """Every case through one engine, each from the weights that the one before it left."""
    from utils.engine import build_engine, trainable_state

    # Layers are recomputed under ZeRO-3 alone, which has to gather them again for that.
    config = grpo_config(LORA.model_copy(update={"lora_dropout": 0.0}), checkpointing=zero_stage == 3)
    settings = config.engine.model_copy(update={"zero_stage": zero_stage, "micro_batch": 2, "accumulation": 1})
    config = config.model_copy(update={"engine": settings})
    model = tiny_model(config.trainable)
    model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
    engine = build_engine(model, config)
    batch = tiny_batch(*(tiny_sample(2 * distributed.rank() + i) for i in range(2)))
    found = {}
    for name, options in CASES.items():
        engine.train()
        changed = config.model_copy(update={"grpo": grpo_config(**options).grpo})
        stage = GrpoStage(changed, engine, StubTokenizer())
        generation.Sampling.draw = _draw(name, distributed.rank())
        prepared = stage.prepare(batch)
        losses = []
        for _ in range(changed.grpo.updates_per_batch):
            loss = stage.loss(prepared)
            engine.backward(loss.total)
            engine.step()
            losses.append({k: float(v) for k, v in loss.parts.items()})
        sums = [float(x.double().sum()) for x in trainable_state(engine).values()]
        everyone = distributed.gather({"losses": losses, "sums": sums})
        found[name] = {
            "losses": [one["losses"] for one in everyone],
            "same": all(one["sums"] == sums for one in everyone),
            "finite": all(math.isfinite(x) for x in sums),
        }
    engine.destroy()
    return found


if __name__ == "__main__":
    distributed.start(threads=1)
    result = {zero_stage: degenerate(int(zero_stage)) for zero_stage in sys.argv[1:]}
    if distributed.is_main():
        print(json.dumps(result))
    distributed.stop()
    leave(0)  # as run_command ends a process
