"""Rewards of sampled answers: format, IoU and class (paper section 3.3), and those that a user adds.

| reward | paper | released code | here |
|---|---|---|---|
| format | 1 if the final sentence is "It is [SEG]" | ends with "It is [SEG]." | the paper's, see `utils.answers.well_formed`; the full stop is optional |
| iou | IoU of predicted and true mask | mean over frames; empty truth: share of true negatives | the same (J of `utils.metrics`), 0 without [SEG] |
| class | "the target is {class_name}": 1 if right | 0/1/2 by one word (`\\w+`) of the second-to-last piece between `,.!?` (LISA_grpo.py:167-185) | the whole name; `grpo.class_scoring: released` scores as released |
| coefficients | 1 each | 1 each | `grpo.reward_weights`; 0 logs a reward without using it |

A reward is a function of one `Judged` answer. Names that are not in `BUILTIN` are looked up in `grpo.reward_module`.
"""  # noqa: E501 (a table)

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils.answers import parse_answer, well_formed
from utils.errors import ConfigError, Problem
from utils.types import Sample


@dataclass(frozen=True)
class Judged:
    """One sampled answer, with all that a reward may read."""

    text: str  # the decoded answer without <|im_end|>
    sample: Sample  # the clip and reference it answers, with `class_name`, `masks`, `truth`
    iou: float  # `frame_iou` of its mask; 0 without [SEG]
    has_seg: bool
    truncated: bool  # cut at the length limit
    tokens: int  # length, <|im_end|> included


Reward = Callable[[Judged], float]

_RELEASED_CLASS = re.compile(r"the target is (?:the )?(\w+)", re.IGNORECASE)


def format_reward(answer: Judged) -> float:
    """1 if the last sentence is exactly "It is [SEG]", with or without a full stop (paper 3.3), else 0."""
    return float(well_formed(answer.text))


def iou_reward(answer: Judged) -> float:
    """IoU of the answer's masks in [0, 1] (paper 3.3); 0 without [SEG], for such an answer asks for no mask."""
    return answer.iou if answer.has_seg else 0.0


def class_reward(answer: Judged) -> float:
    """1 if the answer says "the target is {class_name}" with the true name, else 0 (paper 3.3).

    The whole name counts, of any number of words and with hyphens; case and spacing do not; synonyms do not help. The
    last such phrase of the answer counts, because a reflective path corrects itself.
    """
    return float(names_class(answer.text, answer.sample.class_name))


def released_class_reward(answer: Judged) -> float:
    """0, 1 or 2 as the released code scores (LISA_grpo.py:167-185).

    The answer is cut at commas, full stops, exclamation and question marks. 1 if the second-to-last piece begins with
    "the target is", 1 more if the one word (`\\w+`) behind it, after an optional "the", is the class name: a name of
    two words or with a hyphen can never score 2.
    """
    pieces = [piece.strip() for piece in re.split(r"[,.!?]+", answer.text) if piece.strip()]
    found = _RELEASED_CLASS.match(pieces[-2]) if len(pieces) > 1 else None
    return 0.0 if found is None else 1.0 + (found[1].lower() == answer.sample.class_name)


def names_class(text: str, class_name: str) -> bool:
    """Whether `text` names exactly this class as its target; case and spacing do not matter."""
    return parse_answer(text) == " ".join(class_name.lower().split())


BUILTIN: Mapping[str, Reward] = {"format": format_reward, "iou": iou_reward, "class": class_reward}


class Rewards(NamedTuple):
    """Rewards of R answers."""

    total: Tensor  # float32 [R]: sum of coefficient times reward
    parts: dict[str, Tensor]  # name -> float32 [R], not multiplied


def load_rewards(weights: Mapping[str, float], module: str | None, class_scoring: str = "exact") -> dict[str, Reward]:
    """The functions that `weights` (coefficient by name) names, in its order.

    Args:
        module: "package.module", whose functions of those names are the rewards that are not built in; or
            "package.module:function", which gives that function alone under its own name.
        class_scoring: "exact" or "released", for the reward `class`.

    Raises:
        ConfigError: the module or a function is missing, a name means nothing, or the module is used for nothing.
    """
    known = dict(BUILTIN)
    if class_scoring == "released":
        known["class"] = released_class_reward
    own = _module_functions(module, [name for name in weights if name not in known]) if module else {}
    unknown = [name for name in weights if name not in known and name not in own]
    if unknown:
        rule = f"no reward has this name; built in are {', '.join(BUILTIN)}"
        remedy = "name a module with a function of that name in grpo.reward_module"
        raise ConfigError([Problem("grpo.reward_weights", name, rule, remedy) for name in unknown])
    return {name: {**known, **own}[name] for name in weights}


def _module_functions(path: str, wanted: Sequence[str]) -> dict[str, Reward]:
    module_name, _, function = path.partition(":")
    field = "grpo.reward_module"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or "\0"):
            raise
        remedy = "put the folder that holds it on PYTHONPATH"
        raise ConfigError([Problem(field, path, f"there is no module {module_name}", remedy)]) from error
    names = [function] if function else list(wanted)
    found = {name: getattr(module, name, None) for name in names}
    missing = [name for name in names if not callable(found[name])]
    if missing:
        raise ConfigError([Problem(field, path, f"has no function {n}", "correct one of the two") for n in missing])
    if not set(names) & set(wanted):
        raise ConfigError([Problem(field, path, "is used for nothing", "give its reward a weight in reward_weights")])
    return found


def score(answers: Sequence[Judged], rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Rewards:
    """Judge R answers.

    Raises:
        ValueError: a reward that is not a finite number; names the reward and the row.
    """
    total, parts = torch.zeros(len(answers)), {}
    for name, reward in rewards.items():
        values = parts[name] = torch.tensor([float(reward(answer)) for answer in answers])
        for answer, value in zip(answers, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"reward {name} of an answer about row {answer.sample.row} is {value}: must be finite")
        total = total + weights[name] * values
    return Rewards(total, parts)


def frame_iou(logits: Tensor, masks: Tensor) -> float:
    """Mean over frames of the IoU at probability 0.5; a frame without an object scores its share of empty pixels.

    The J of `utils.metrics` for one row at native size (protocol per_expression), computed where the logits [T,H,W]
    are; masks are bool [T,H,W].

    Raises:
        ValueError: shapes disagree.
    """
    if logits.shape != masks.shape:
        raise ValueError(f"logits {tuple(logits.shape)} against masks {tuple(masks.shape)}")
    predicted, truth = logits.float().sigmoid().flatten(1) > 0.5, masks.flatten(1)
    # The clamp only guards empty frames, whose score is taken from `empty` below.
    both, either = (predicted & truth).sum(1), (predicted | truth).sum(1)
    iou = both / either.clamp(min=1)
    empty = (~predicted).float().mean(1)
    return float(torch.where(truth.any(1), iou, empty).mean())
