"""Every knob of a run: `RunConfig`, with the sections of `configs.sections` and `configs.stages`.

The models are frozen, strictly typed and refuse unknown keys. Rules that span several fields live in `configs.rules`
and are checked together, so that one attempt shows every problem. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from configs.fields import Section, knob
from configs.rules import broken_rules
from configs.sections import (
    DataConfig,
    EngineConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainableConfig,
)
from configs.stages import EvalConfig, GrpoConfig, ReflectiveConfig, SftConfig
from configs.watch import WatchConfig

__all__ = [
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "GrpoConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ReflectiveConfig",
    "RunConfig",
    "SftConfig",
    "StageName",
    "TrainableConfig",
    "WatchConfig",
]

StageName = Literal["teacher", "sft", "reflective", "grpo", "eval"]


class RunConfig(Section):
    """One run of one stage.

    Raises:
        pydantic.ValidationError: for a field of the wrong type or range, an unknown key or a broken rule between
            fields; `utils.config.load_config` turns it into a `ConfigError` that lists everything at once.
    """

    stage: StageName = knob(
        ..., "what the run does: the training stage of train_ds.py, or `eval` for train_ds_test.py", "name", "paper 3"
    )
    seed: int = knob(0, "seed of data order, dropout and sampling (each rank adds its number)", "1", "ours", ge=0)
    output_dir: str = knob(
        "runs/default", "folder of this run: checkpoints, metrics, final weights", "path", "ours", min_length=1
    )
    init_from: str | None = knob(
        None,
        "run or checkpoint folder whose trained weights the stage starts from; null = the base",
        "path",
        "paper 3.2",
    )
    model: ModelConfig = ModelConfig()
    trainable: TrainableConfig = TrainableConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    loss: LossConfig = LossConfig()
    log: LogConfig = LogConfig()
    watch: WatchConfig = WatchConfig()
    sft: SftConfig = SftConfig()
    reflective: ReflectiveConfig = ReflectiveConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check_rules(self) -> RunConfig:
        problems = broken_rules(self)
        if problems:
            text = "; ".join(f"{', '.join(p.fields)}: {p.rule}. Remedy: {p.remedy}" for p in problems)
            raise PydanticCustomError("impossible_combination", "{text}", {"text": text, "problems": problems})
        return self
