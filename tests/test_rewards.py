"""Rewards: one string per rule, the IoU against the evaluator's J, rewards of a user's own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.objectives.rewards import (
    Judged,
    class_reward,
    frame_iou,
    iou_reward,
    load_rewards,
    released_class_reward,
    score,
)
from tests.aurora_cases import tiny_sample
from utils.config import load_config
from utils.errors import ConfigError
from utils.metrics import score_batch

FLEXIBLE = (
    "The reference states that the object making the sound is played by the man. Since the cello is the instrument "
    "being played by the man in the images, and it's the object that makes a sound in the audio, the target is cello. "
    "It is [SEG]."
)
"""The end of the paper's flexible example (section 8.2) as an answer."""
ROOT = Path(__file__).resolve().parent.parent


def judged(text: str, class_name: str = "dog", iou: float = 0.5, has_seg: bool = True) -> Judged:
    sample = replace(tiny_sample(0), class_name=class_name)
    return Judged(text, sample, iou, has_seg, truncated=False, tokens=len(text.split()))


@pytest.mark.parametrize(
    ("text", "class_name", "reward", "released", "reason"),
    [
        ("Thus the target is dog. It is [SEG].", "dog", 1, 0, "released code wants the phrase first in its piece"),
        ("The target is dog. It is [SEG].", "dog", 1, 2, "right"),
        ("The target is the dog. It is [SEG].", "dog", 1, 2, "an article is allowed"),
        ("The target is DOG. It is [SEG].", "dog", 1, 2, "case does not matter"),
        ("The target is cat. It is [SEG].", "dog", 0, 1, "wrong; the released code pays the phrase"),
        ("The target is dogs. It is [SEG].", "dog", 0, 1, "another word"),
        ("The target is acoustic guitar. It is [SEG].", "acoustic guitar", 1, 1, r"two words; \w+ reads one"),
        ("The target is ping-pong ball. It is [SEG].", "ping-pong ball", 1, 1, "a hyphen"),
        ("The target is guitar. It is [SEG].", "acoustic guitar", 0, 1, "half a name is another name"),
        ("The target is emergency-car. It is [SEG].", "emergency-car", 1, 1, "hyphen alone"),
        ("The target is puppy. It is [SEG].", "dog", 0, 1, "no synonyms (paper 3.3)"),
        ("The target is cat. Wait. The target is dog. It is [SEG].", "dog", 1, 2, "the correction counts"),
        ("The target is dog. No. The target is cat. It is [SEG].", "dog", 0, 1, "and replaces the first"),
        ("The target is dog. So. It is [SEG].", "dog", 1, 0, "the released code reads the second-to-last piece only"),
        ("It is the dog. It is [SEG].", "dog", 0, 0, "the phrase is missing"),
        ("Since it barks, the target is dog. It is [SEG].", "dog", 1, 2, "a comma ends a piece"),
        ("Is it loud? the target is dog! It is [SEG].", "dog", 1, 2, "and so do ? and !"),
        ("The target is dog, the loud one. It is [SEG].", "dog", 1, 0, "a comma behind the name hides it"),
        ("Since it barks, the target is cat. It is [SEG].", "dog", 0, 1, "the phrase alone"),
        ("So the correct target is dog. It is [SEG].", "dog", 1, 0, "the words of the example in section 6.1"),
        (FLEXIBLE, "cello", 1, 2, "the paper's own flexible example (8.2)"),
        ("", "dog", 0, 0, "empty"),
    ],
)
def test_class(text: str, class_name: str, reward: float, released: float, reason: str) -> None:
    assert class_reward(judged(text, class_name)) == reward, reason
    assert released_class_reward(judged(text, class_name)) == released, reason


def test_the_scoring_of_the_released_code_has_its_name() -> None:
    assert load_rewards({"class": 1.0}, None, "released")["class"] is released_class_reward
    with pytest.raises(ConfigError, match="grpo.class_scoring = 'published'.*'exact' or 'released'"):
        load_config(ROOT / "configs/grpo.yaml", ["grpo.class_scoring=published"])


def test_iou_needs_a_seg() -> None:
    assert iou_reward(judged("", iou=0.7)) == 0.7
    assert iou_reward(judged("", iou=0.7, has_seg=False)) == 0


def test_frame_iou_is_the_evaluators_j() -> None:
    """Frames with and without an object, and a probability of exactly 0.5, which is not above it."""
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(6, 9, 11, generator=generator), torch.rand(6, 9, 11, generator=generator) > 0.6
    masks[2:4], logits[3, :4], logits[5] = False, 0.0, -1.0
    wanted = score_batch(logits[None], masks[None], "per_expression").j
    assert frame_iou(logits, masks) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="against masks"):
        frame_iou(logits, masks[:5])


def test_frame_iou_by_hand() -> None:
    """Frame 0: 1 pixel of 3 in common; frame 1 without an object: 3 of 4 pixels are empty."""
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]])
    masks = torch.tensor([[[True, False], [True, False]], [[False, False], [False, False]]])
    assert frame_iou(logits, masks) == pytest.approx((1 / 3 + 3 / 4) / 2)


def test_total_is_weighted_and_a_weight_of_zero_still_reports() -> None:
    """Table 5: format and IoU alone."""
    weights = {"format": 1.0, "iou": 2.0, "class": 0.0}
    answers = [judged("The target is dog. It is [SEG].", iou=0.25), judged("The target is dog.", has_seg=False)]
    found = score(answers, load_rewards(weights, None), weights)
    assert found.total.tolist() == [1.5, 0.0]
    assert {k: v.tolist() for k, v in found.parts.items()} == {
        "format": [1.0, 0.0], "iou": [0.25, 0.0], "class": [1.0, 1.0]
    }  # fmt: skip
    released = load_rewards(weights, None, "released")
    assert score(answers, released, weights).parts["class"].tolist() == [2.0, 0.0]


def test_rewards_of_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_module.py").write_text(
        "def brevity(answer):\n    return 1 / answer.tokens\n\n"
        "def broken(answer):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards_module", raising=False)
    weights = {"iou": 1.0, "brevity": 4.0}
    for module in ("own_rewards_module", "own_rewards_module:brevity"):
        found = score([judged("a b", iou=0.5)], load_rewards(weights, module), weights)
        assert found.total.tolist() == [2.5]
    with pytest.raises(ValueError, match="reward broken of an answer about row 0 is nan"):
        score([judged("a")], load_rewards({"broken": 1.0}, "own_rewards_module"), {"broken": 1.0})


@pytest.mark.parametrize(
    ("weights", "module", "message"),
    [
        ({"iuo": 1.0}, None, "no reward has this name; built in are format, iou, class"),
        ({"brevity": 1.0}, "no_such_module_here", "there is no module no_such_module_here"),
        ({"brevity": 1.0}, "math", "has no function brevity"),
        ({"brevity": 1.0}, "math:sqrt", "is used for nothing"),
        ({"iou": 1.0}, "math", "is used for nothing"),
    ],
)
def test_wrong_names(weights: dict[str, float], module: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_rewards(weights, module)
