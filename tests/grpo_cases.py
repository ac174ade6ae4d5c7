"""Rollouts with given answers, a plain engine to compare with, and the processes that tests/test_grpo.py starts.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.grpo_cases ZERO_STAGE

prints one JSON object: case -> losses of all processes and whether their weights agree after a step.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import RunConfig, TrainableConfig
from model.aurora import generation
from model.aurora.group import GroupInputs, GroupOutput
from model.aurora.model import AuroraModel
from model.objectives.rewards import Judged
from model.stages.grpo import GrpoStage
from tests.aurora_cases import LORA, SEG, STOP, StubTokenizer, run_config, tiny_batch, tiny_model, tiny_sample
from utils import distributed
from utils.types import Batch, Generation, MediaFeatures

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
        "group_size": 3, "top_p": 1.0, "max_new_tokens": 8, "reward_module": "tests.grpo_cases:length_reward",
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
    has_seg = torch.tensor([SEG in answer for answer in answers])
    texts = [StubTokenizer().decode([t for t in answer if t != STOP]) for answer in answers]
    seg_hidden = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(3)) * has_seg[:, None]
    truncated = torch.tensor([answer[-1] != STOP for answer in answers])
    return Generation(ids, texts, seg_hidden, has_seg, truncated, [torch.zeros(len(x)) for x in ids])


class PlainEngine(nn.Module):
    """The stage's engine without any sharing: G full copies of each prompt through the ordinary forward."""

    def __init__(self, model: AuroraModel, batch: Batch, answers: Generation, temperature: float) -> None:
        super().__init__()
        self.module, self.batch, self.answers, self.temperature = model, batch, answers, temperature

    def forward(self, packed: GroupInputs, media: MediaFeatures, frame_index: Tensor | None) -> GroupOutput:
        prompts = [p for p in self.batch.prompts for _ in range(packed.group)]
        copies = self.module.pack(self.batch, self.answers.token_ids, prompts)
        output = self.module(copies, media.repeat(packed.group), frame_index)
        scores = F.log_softmax(output.answer_logits.float() / self.temperature, -1)
        log_probs = scores.gather(-1, output.answer_labels[:, None])[:, 0]
        entropy = -(scores.exp() * scores).sum(-1).detach()
        places = torch.zeros(packed.targets.shape)
        return GroupOutput(
            places.masked_scatter(packed.mask, log_probs),
            places.masked_scatter(packed.mask, entropy),
            output.seg_features,
            output.has_seg,
            output.mask_logits,
        )


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
    """Every case through the engine: two losses and steps each."""
    from utils.engine import build_engine, trainable_state

    found = {}
    for name, options in CASES.items():
        trainable = LORA.model_copy(update={"lora_dropout": 0.0})
        config = grpo_config(trainable, checkpointing=zero_stage == 3, **options)
        engine_config = config.engine.model_copy(update={"zero_stage": zero_stage, "micro_batch": 2, "accumulation": 1})
        config = config.model_copy(update={"engine": engine_config})
        model = tiny_model(config.trainable)
        model.backbone.set_gradient_checkpointing(config.engine.gradient_checkpointing)
        engine = build_engine(model, config)
        engine.train()
        stage = GrpoStage(config, engine, StubTokenizer())
        batch = tiny_batch(*(tiny_sample(2 * distributed.rank() + i) for i in range(2)))
        losses = []
        for _ in range(2):
            generation.Sampling.draw = _draw(name, distributed.rank())
            prepared = stage.prepare(batch)
            for _ in range(config.grpo.updates_per_batch):
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
    result = degenerate(int(sys.argv[1]))
    if distributed.is_main():
        print(json.dumps(result))
    distributed.stop()
