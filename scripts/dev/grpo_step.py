"""One whole step of stage 3, encoding included, on random weights: what `scripts/dev/bench_grpo.py` times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.aurora.model import AuroraModel
from model.stages.grpo import GrpoStage
from scripts.dev.random_run import BenchTokenizer, random_batch, random_model
from scripts.plan_memory import Workload
from tests.oracles.plain_grpo import PlainGrpoStage
from utils.config import load_config
from utils.types import Batch, Generation, MediaFeatures, StepLoss

ROOT = Path(__file__).resolve().parents[2]


class EndsInSeg:
    """Random weights write no [SEG]; each answer gets one in the place of its last token, so that masks are trained."""

    def draw(self, batch: Batch) -> tuple[MediaFeatures, Generation]:
        media, answers = super().draw(batch)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(len(answers.token_ids), self.model.text_hidden_fcs[0][0].in_features, generator=generator)
        for row in answers.token_ids:
            row[-1] = self.model.seg_token_id
        everyone = torch.arange(len(states))
        return media, replace(answers, seg_hidden=states, answer_of_query=everyone, log_probs=None)


class FastStage(EndsInSeg, GrpoStage):
    """The project's stage."""


class PlainStage(EndsInSeg, PlainGrpoStage):
    """G full copies."""


class StepCase:
    """A clip of 10 frames and 10 s of sound through towers and SAM of the mini base and a language model of its own.

    Args:
        folder: gets the config.json of the base.
        language: fields of the language model's configuration.
        prompt: P, tokens of the prompt, media included.
        group: G.
        new_tokens: C, tokens of each answer.
    """

    def __init__(self, folder: Path, language: dict[str, int], prompt: int, group: int, new_tokens: int) -> None:
        mini = json.loads((ROOT / "assets/mini_base/config.json").read_text(encoding="utf-8"))
        text = json.dumps({**mini, **language, "hidden_size_a": language["hidden_size"]})
        (folder / "config.json").write_text(text, encoding="utf-8")
        config = load_config(ROOT / "configs/mini/grpo.yaml", [
            f"model.base={folder}", "engine.micro_batch=1", "data.feature_cache=none", "grpo.temperature=1.0",
            "grpo.top_p=1.0", "grpo.mask_loss_on=all", f"grpo.group_size={group}", f"grpo.max_new_tokens={new_tokens}",
        ])  # fmt: skip
        torch.manual_seed(0)
        model = random_model(config, torch.device("cpu"))
        self.batch = _batch(model, prompt, group, new_tokens)
        tokenizer = _NoStop(model.seg_token_id)
        self.stages = {"fast": FastStage(config, model, tokenizer), "plain": PlainStage(config, model, tokenizer)}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run(self, path: str) -> StepLoss:
        """Sample, judge, score, backward and step; at a learning rate of 0, so that every step is the same."""
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        stage = self.stages[path]
        step = stage.loss(stage.prepare(self.batch))
        step.total.backward()
        self.optimizer.step()
        return step

    def fast(self) -> Tensor:
        return self.run("fast").total.detach()

    def plain(self) -> Tensor:
        return self.run("plain").total.detach()


class _NoStop(BenchTokenizer):
    """No answer ends before its time: the stop token is none of the vocabulary."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return self.ids["[SEG]"] if tokens == "[SEG]" else 2**31


def _batch(model: AuroraModel, prompt: int, group: int, new_tokens: int) -> Batch:
    """One clip whose prompt has `prompt` tokens."""
    work = Workload(1, group, 10, (96, 96), 10.0, 40, new_tokens)
    short = model.pack(random_batch(model, work), None).attention_mask.sum().item()
    if prompt <= short:
        raise ValueError(f"a prompt of {prompt} tokens: its media and the least of text have {short}")
    return random_batch(model, replace(work, prompt_tokens=work.prompt_tokens + prompt - short))
