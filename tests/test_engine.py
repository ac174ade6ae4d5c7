"""The engine against AdamW written out by hand, at every ZeRO stage, in one and two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import OptimConfig
from tests.engine_cases import COMBINATIONS, Net, config
from tests.tiny_run import ROOT, launched, own_noise, run
from utils import distributed
from utils.engine import LearningRate, parameter_groups
from utils.errors import ConfigError


def run_case(case: str, *arguments: str, processes: int = 1) -> Any:
    """The JSON line that tests/engine_cases.py prints last."""
    script = str(Path(__file__).parent / "engine_cases.py")
    done = run(launched(script, case, *arguments, processes=processes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not own_noise(done.stdout + done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_own_noise_is_told_from_that_of_other_packages() -> None:
    others = f"/x/torch/distributed/c10d_logger.py:83: FutureWarning: `f` is deprecated.\n  return func(*args)\n" \
             f"{ROOT}/.venv/lib/torch/a.py:1: UserWarning: old\nan error: none\n"  # fmt: skip
    assert not own_noise(others)
    ours = ["Traceback (most recent call last):", "error: no such file", f"{ROOT}/utils/a.py:3: UserWarning: old",
            "train_ds.py:9: FutureWarning: `f` is deprecated"]  # fmt: skip
    assert own_noise(others + "\n".join(ours)) == ours


def by_hand(world: int) -> tuple[list[float], list[float], float]:
    """Mean loss of each of four steps, the weights after them and the first gradient's norm, in plain torch."""
    distributed.seed_everything(0)
    net, optim = Net(), config(0, "fp32").optim
    bodies, heads = list(net.body.parameters()), list(net.head.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": bodies}, {"params": heads}], lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
    )
    losses, norms = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4 * world, 8, generator=generator)
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 8
        for group, scale in zip(optimizer.param_groups, (1.0, 2.0), strict=True):
            group["lr"] = optim.lr * scale * factor
        loss = (net(x) - x.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([*bodies, *heads], optim.clip_norm)))
        optimizer.step()
        losses.append(loss.item())
    return losses, [v for p in (*bodies, *heads) for v in p.flatten().tolist()], norms[0]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.smoke)])
def test_every_combination_equals_plain_adamw(processes: int) -> None:
    found = run_case("train_all", processes=processes)
    losses, weights, norm = by_hand(processes)
    assert set(found) == {f"{zero} {precision}" for zero, precision in COMBINATIONS}
    for name, result in found.items():
        exact = name.endswith("fp32")
        assert result["names"] == ["body.weight", "body.bias", "head.weight", "head.bias"]
        assert result["buffer"] == "torch.float32"
        assert result["same_on_all"]
        assert result["norm_unclipped"] == pytest.approx(norm, rel=1e-5 if exact else 3e-2)
        assert result["rates"] == pytest.approx([1e-2 * 0.75, 2e-2 * 0.75])
        assert result["weights"] == pytest.approx(weights, abs=2e-6 if exact else 2e-2)
        if processes == 1:
            assert result["losses"] == pytest.approx(losses, rel=1e-5 if exact else 5e-2)


def test_schedules() -> None:
    linear = LearningRate(OptimConfig(steps=10, warmup_steps=4))
    assert [linear(step) for step in (0, 1, 3, 4, 7, 9, 10, 99)] == pytest.approx([0.25, 0.5, 1, 1, 0.5, 1 / 6, 0, 0])
    cosine = LearningRate(OptimConfig(steps=10, warmup_steps=0, schedule="cosine"))
    assert [cosine(step) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    constant = LearningRate(OptimConfig(steps=10, warmup_steps=2, schedule="constant"))
    assert [constant(step) for step in (0, 2, 9)] == [0.5, 1.0, 1.0]


def test_the_decay_may_reach_past_the_run() -> None:
    """As in the released GRPO trainer: 500 steps of a decay over 4,000 leave 0.88 of the rate."""
    released = LearningRate(OptimConfig(steps=500, warmup_steps=30, decay_steps=4000))
    assert released(29) == 1.0
    assert [released(step) for step in (30, 500, 4000)] == pytest.approx([1, 1 - 470 / 3970, 0])
    cosine = LearningRate(OptimConfig(steps=10, warmup_steps=0, decay_steps=20, schedule="cosine"))
    assert [cosine(step) for step in (0, 10, 20)] == pytest.approx([1, 0.5, 0])


def test_parameter_groups() -> None:
    optim = OptimConfig(lr=1.0, group_lr_scale={"head": 2.0, r"(head|body)\.bias": 3.0})
    groups = parameter_groups(Net().named_parameters(), optim)
    assert [(g["lr"], len(g["params"])) for g in groups] == [(1.0, 1), (2.0, 2), (3.0, 1)]
    with pytest.raises(ConfigError, match="'nothing': matches no trainable parameter") as caught:
        parameter_groups(Net().named_parameters(), OptimConfig(group_lr_scale={"nothing": 2.0, "frozen": 2.0}))
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="nothing is trained"):
        parameter_groups(Net().requires_grad_(False).named_parameters(), OptimConfig())


def test_means_over_processes() -> None:
    assert run_case("means") == {"loss": 3.5, "always": 2.0, "rare": 5.0}
    assert run_case("means", processes=2) == {"loss": 3.0, "always": 2.0, "rare": 5.0}
