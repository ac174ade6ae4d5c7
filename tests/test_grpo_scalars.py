"""Stage 3: which masks are trained, what is logged, and the sampled answers that are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from model.objectives.rewards import Judged, frame_iou
from model.stages.grpo import supervised_answers
from tests.aurora_cases import SEG, STOP, VOCABULARY, WHOLE, tiny_batch, tiny_sample
from tests.grpo_cases import RAGGED, draw_ragged, given, grpo_config, make_stage, two_clips
from utils.results import decode_masks
from utils.types import Batch, Generation


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Generation:
    return draw_ragged(monkeypatch)


def judged_of(answers: list, batch: Batch) -> list[Judged]:
    """The answers, equally many about each clip."""
    texts, group = given(answers, 8).texts, len(answers) // len(batch)
    return [
        Judged(text, batch.samples[i // group], 0.5, SEG in answer, False, len(answer))
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]


def test_which_masks_are_trained() -> None:
    judged = judged_of(RAGGED, two_clips())
    judged[0] = replace(judged[0], text="The target is dog. It is [SEG].")
    judged[2] = replace(judged[2], text="The target is dog.")
    rewards = torch.tensor([1.0, 2.0, 3.0, 1.0, 5.0, 1.0])
    wanted = {
        "all": [True, True, False, True, False, True],
        "class_correct": [True, False, False, False, False, False],
        "best": [False, True, False, True, False, False],
        "none": [False] * 6,
    }
    for rule, flags in wanted.items():
        assert supervised_answers(rule, judged, rewards, 3).tolist() == flags, rule
    nothing = judged_of([[1], [2]], tiny_batch(tiny_sample(0)))
    assert supervised_answers("best", nothing, torch.zeros(2), 2).tolist() == [False, False]


def test_scalars_and_truncation(drawn: Generation) -> None:
    stage = make_stage(grpo_config(mask_truncated=True))
    prepared = stage.prepare(two_clips())
    assert prepared.trained.tolist() == [True, False, False, True, True, True]
    parts = {k: v.item() for k, v in stage.loss(prepared).parts.items()}
    names = {"reward_all", "reward_format", "reward_iou", "reward_class", "reward_length_reward", "completion_length",
             "truncated_share", "group_std", "zero_variance_share", "supervised_share", "entropy", "clip_fraction",
             "policy_loss", "mask_bce_loss", "mask_dice_loss", "mask_loss", "loss", "sampling_gap"}  # fmt: skip
    assert set(parts) == names
    again = stage.loss(stage.prepare(two_clips())).parts  # the second time there is a time since the first
    assert set(again) == names | {"tokens_per_second"} and again["tokens_per_second"] > 0
    assert parts["completion_length"] == pytest.approx(sum(map(len, RAGGED)) / 6)
    assert parts["truncated_share"] == pytest.approx(2 / 6) and parts["zero_variance_share"] == 0
    assert parts["reward_length_reward"] == pytest.approx(sum(map(len, RAGGED)) / 24)
    assert parts["loss"] == pytest.approx(parts["policy_loss"] + parts["mask_loss"], rel=1e-6)
    assert 0 < parts["entropy"] <= math.log(VOCABULARY)


def test_equal_rewards_leave_only_the_masks(drawn: Generation) -> None:
    config = grpo_config(WHOLE, reward_module=None, reward_weights={"format": 1.0})
    stage = make_stage(config)
    prepared = stage.prepare(two_clips())
    step = stage.loss(prepared)
    step.total.backward()
    assert step.parts["zero_variance_share"].item() == 1 and step.parts["policy_loss"].item() == 0
    head = stage.model.backbone.language_model.lm_head.weight.grad
    assert head.abs().max() == 0 and stage.model.text_hidden_fcs[0][0].weight.grad.abs().max() > 0


def test_stop_token_is_scored(drawn: Generation) -> None:
    """<|im_end|> belongs to the answer: its probability is trained too."""
    packed = make_stage(grpo_config()).prepare(two_clips()).packed
    assert (packed.targets == STOP).sum() == sum(STOP in answer for answer in RAGGED)


def test_samples_are_kept_with_rewards_and_masks(drawn: Generation) -> None:
    """Every answer of the last batch, for samples.jsonl."""
    stage = make_stage(grpo_config(mask_loss_on="best"))
    prepared = stage.prepare(two_clips())
    records = json.loads(json.dumps(stage.records(prepared)))
    assert [(r["row"], r["sample"]) for r in records] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [r["tokens"] for r in records] == list(map(len, RAGGED))
    assert [r["mask_trained"] for r in records] == prepared.supervised.tolist()
    for number, record in enumerate(records):
        assert record["reward"] == pytest.approx(sum(record["rewards"].values()), abs=1e-3)
        assert record["reward"] == pytest.approx(prepared.rewards.total[number].item(), abs=1e-4)
        assert record["advantage"] == pytest.approx(prepared.advantages.values[number].item(), abs=1e-4)
        assert record["answer"] == prepared.answers.texts[number] and bool(record["masks"]) is record["has_seg"]
        if record["has_seg"]:
            masks = torch.from_numpy(decode_masks(record["masks"]))
            truth = prepared.batch.masks[number // 3]
            assert masks.shape == truth.shape
            assert record["rewards"]["iou"] == pytest.approx(frame_iou(masks.float() * 2 - 1, truth), abs=1e-3)
