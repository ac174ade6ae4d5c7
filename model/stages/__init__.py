"""Training stages: each prepares a batch without gradient and gives a differentiable loss with."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from configs.schema import RunConfig
from model.stages.base import Stage
from model.stages.grpo import GrpoStage
from model.stages.reflective import ReflectiveStage
from model.stages.sft import SftStage
from model.stages.teacher import TeacherStage

STAGES = {"teacher": TeacherStage, "sft": SftStage, "reflective": ReflectiveStage, "grpo": GrpoStage}
"""By `stage` of the configuration."""


def build_stage(config: RunConfig, engine: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Stage:
    """The stage that `config.stage` names.

    Raises:
        ValueError: the name is no training stage.
    """
    if config.stage not in STAGES:
        raise ValueError(f"stage = {config.stage!r}: must be one of {', '.join(STAGES)}")
    return STAGES[config.stage](config, engine, tokenizer)
