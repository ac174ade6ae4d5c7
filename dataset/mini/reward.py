"""Reward for right reasoning, where the true chain is known (the mini world).

    grpo:
      reward_module: dataset.mini.reward
      reward_weights: {format: 1.0, iou: 1.0, class: 1.0, faithful: 1.0}   # 0.0 draws the curve without rewarding it

The paper's three rewards do not look at the reasoning: an answer that guesses its steps and names the right class gets
all of them. `reward_faithful` is the share of sampled answers whose every step is right, as `faithful` is in evaluation.
"""  # noqa: E501 (a config line)

from __future__ import annotations

from typing import Protocol

from dataset.mini.language import chain_is_faithful
from utils.errors import DataError
from utils.types import Sample


class Judged(Protocol):
    """What is read of a `model.objectives.rewards.Judged`."""

    text: str
    sample: Sample


def faithful(answer: Judged) -> float:
    """1 if every step is right (what is seen and where, what is heard, the reference, the answer), else 0.

    Raises:
        DataError: the true chain of the row is not known.
    """
    sample = answer.sample
    if sample.truth is None:
        raise DataError(
            f"row {sample.row} ({sample.uid}): the reward `faithful` needs the true chain, which the data do not hold. "
            "Remedy: take it out of grpo.reward_weights, or train on the mini world (mini_truth.jsonl)"
        )
    return float(chain_is_faithful(answer.text, sample.truth, sample.reference))
