"""The optional reward for right reasoning: the mini world's truth through a module that a config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.mini import language as language
from dataset.mini import scene as scenes
from model.objectives.rewards import Judged, load_rewards, score
from tests.aurora_cases import tiny_sample
from utils.config import load_config
from utils.errors import DataError

CONFIG = Path(__file__).resolve().parent.parent / "configs/mini/grpo_reasoning.yaml"


def judged(text: str, truth: dict | None, reference: str, name: str) -> Judged:
    sample = replace(tiny_sample(0), truth=truth, reference=reference, class_name=name)
    return Judged(text, sample, iou=0.5, has_seg=True, truncated=False, tokens=9)


def test_the_shipped_config_rewards_right_reasoning() -> None:
    """A right chain, one with a wrong step that the paper's rewards do not see, and the answer alone."""
    settings = load_config(CONFIG).grpo
    scene = next(s for s in (scenes.make_scene((6, i)) for i in range(50)) if len(s.sounds) == 2)
    question = next(q for q in language.questions(scene) if q.kind == "temporal")
    truth, name = language.truth(scene, question), scene.things[question.target].class_name
    right = language.reasoning(scene, question, question.reference, np.random.default_rng(0)) + " It is [SEG]."
    wrong = right.replace("loud", "?").replace("quiet", "loud").replace("?", "quiet")
    texts = (right, wrong, f"The target is {name}. It is [SEG].")
    answers = [judged(text, truth, question.reference, name) for text in texts]
    rewards = load_rewards(settings.reward_weights, settings.reward_module, settings.class_scoring)
    found = score(answers, rewards, settings.reward_weights)
    assert wrong != right and found.parts["faithful"].tolist() == [1.0, 0.0, 0.0]
    assert found.parts["class"].tolist() == found.parts["format"].tolist() == [1.0, 1.0, 1.0]
    assert found.total.tolist() == [3.5, 2.5, 2.5]


def test_a_weight_of_zero_draws_the_curve_alone() -> None:
    weights = {"format": 1.0, "faithful": 0.0}
    answers = [judged("It is [SEG].", {"things": [], "sounds": [], "target": None}, "the dog", "dog")]
    found = score(answers, load_rewards(weights, "dataset.mini.reward"), weights)
    assert found.total.tolist() == [1.0] and found.parts["faithful"].tolist() == [0.0]


def test_data_without_the_truth_are_refused() -> None:
    rewards = load_rewards({"faithful": 1.0}, "dataset.mini.reward:faithful")
    with pytest.raises(DataError, match=r"row 0 .* needs the true chain"):
        score([judged("It is [SEG].", None, "the dog", "dog")], rewards, {"faithful": 1.0})
