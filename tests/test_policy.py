"""Policy objectives against hand-worked numbers, gradients at the clip edges, and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.objectives.policy import (
    clipped_surrogate,
    group_advantages,
    k3_divergence,
    policy_mean,
    token_log_probs,
)

# ---- advantages (eq. 4)


def test_advantages_by_hand() -> None:
    """Rewards 1, 2, 3: mean 2, unbiased std 1. Rewards 0, 0, 3: mean 1, std sqrt(3)."""
    found = group_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 3.0]), 3, eps=1e-4)
    root = math.sqrt(3)
    wanted = [-1 / 1.0001, 0, 1 / 1.0001, -1 / (root + 1e-4), -1 / (root + 1e-4), 2 / (root + 1e-4)]
    torch.testing.assert_close(found.values, torch.tensor(wanted))
    torch.testing.assert_close(found.std, torch.tensor([1.0, root]))
    assert found.zero_variance.tolist() == [False, False]


@pytest.mark.parametrize(
    ("kind", "wanted"), [("mean", [-1.0, -1.0, 2.0]), ("leave_one_out", [-1.5, -1.5, 3.0])]
)
def test_advantages_without_std(kind: str, wanted: list[float]) -> None:
    """Leave-one-out by hand: 0 - (0 + 3) / 2 = -1.5 and 3 - 0 = 3."""
    torch.testing.assert_close(group_advantages(torch.tensor([0.0, 0.0, 3.0]), 3, kind).values, torch.tensor(wanted))


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
def test_equal_rewards_teach_nothing(kind: str) -> None:
    """0.1 three times has a mean that is not 0.1 in float32 sums of some sizes; the advantage is 0 all the same."""
    found = group_advantages(torch.tensor([0.1] * 7 + [0.0] * 6 + [1.0]), 7, kind)
    assert found.values[:7].tolist() == [0.0] * 7 and found.std[0] == 0
    assert found.zero_variance.tolist() == [True, False]


def test_bad_groups() -> None:
    for rewards, group in ((torch.zeros(4), 3), (torch.zeros(3), 1), (torch.zeros(2, 2), 2)):
        with pytest.raises(ValueError, match="must divide"):
            group_advantages(rewards, group)
    with pytest.raises(ValueError, match="must be std"):
        group_advantages(torch.zeros(4), 2, "median")


# ---- surrogate (eq. 5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),  # the first update: REINFORCE
        (1.1, 2.0, -2.2, -2.2, False),
        (1.29, 2.0, -2.56, 0.0, True),  # above 1 + eps_high = 1.28: a good token is not pushed further
        (1.29, -2.0, 2.58, 2.58, False),  # but a bad one that became likelier is pulled back
        (0.7, -2.0, 1.6, 0.0, True),  # below 1 - eps = 0.8: a bad token is not pushed further
        (0.7, 2.0, -1.4, -1.4, False),  # but a good one that became less likely is pulled back
        (1.25, 2.0, -2.5, -2.5, False),  # inside the wider upper edge
    ],
)
def test_surrogate_at_both_edges(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    """d(r A)/d log pi = r A inside, 0 where the clipped branch is the smaller."""
    log_probs = torch.tensor([[math.log(0.3 * ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(0.3)]], dtype=torch.float64)
    found = clipped_surrogate(log_probs, old, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28)
    found.loss.sum().backward()
    assert found.loss.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(gradient)
    assert found.clipped.item() is clipped


def test_surrogate_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(4, 5, generator=generator) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5])
    found = clipped_surrogate(new, old, advantages, 0.1, 0.3)
    for i in range(4):
        for t in range(5):
            r, a = math.exp(new[i, t] - old[i, t]), advantages[i].item()
            bounded = min(max(r, 0.9), 1.3) * a
            assert found.loss[i, t].item() == pytest.approx(-min(r * a, bounded), abs=1e-6)
            if abs(r * a - bounded) > 1e-6:
                assert bool(found.clipped[i, t]) == (bounded < r * a)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="are needed"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2), 0.2, 0.2)


def test_k3_by_hand() -> None:
    """d = ln 2: 2 - ln 2 - 1; at d = 0 value and gradient are 0."""
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    found = k3_divergence(log_probs, torch.tensor([[-1.0, -2.0 + math.log(2)]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1 - math.log(2)]]))
    found.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -1.0]]))


def test_means_by_hand() -> None:
    """Answers of 1 and 3 tokens: sequence (2 + (1 + 2 + 6) / 3) / 2 = 2.5, token 11 / 4."""
    losses = torch.tensor([[2.0, 9.0, 9.0], [1.0, 2.0, 6.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert policy_mean(losses, mask, "sequence").item() == pytest.approx(2.5)
    assert policy_mean(losses, mask, "token").item() == pytest.approx(11 / 4)
    mask[0] = False  # a truncated answer left out: it still divides in "sequence"
    assert policy_mean(losses, mask, "sequence").item() == pytest.approx(1.5)
    assert policy_mean(losses, mask, "token").item() == pytest.approx(3.0)
    with pytest.raises(ValueError, match="must be sequence or token"):
        policy_mean(losses, mask, "batch")


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_no_token_gives_zero_with_a_gradient(kind: str) -> None:
    losses = torch.tensor([[float("inf"), 1.0]], requires_grad=True)
    mean = policy_mean(losses, torch.zeros(1, 2, dtype=torch.bool), kind)
    mean.backward()
    assert mean.item() == 0 and losses.grad.tolist() == [[0.0, 0.0]]


# ---- log-probabilities


class Head(nn.Linear):
    """Keeps the largest number of rows it was asked for."""

    largest = 0

    def forward(self, input: Tensor) -> Tensor:
        self.largest = max(self.largest, len(input))
        return super().forward(input)


@pytest.mark.parametrize(("chunk", "temperature"), [(3, 1.0), (3, 0.6), (100, 1.0)])
def test_chunked_log_probs_equal_the_plain_formula(chunk: int, temperature: float) -> None:
    torch.manual_seed(0)
    head, hidden, ids = Head(6, 11), torch.randn(10, 6, requires_grad=True), torch.randint(0, 11, (10,))
    weights = torch.randn(10)
    log_probs, entropy = token_log_probs(head, hidden, ids, temperature, chunk)
    ours = torch.autograd.grad((log_probs * weights).sum(), [hidden, head.weight, head.bias])
    assert head.largest == min(chunk, 10)
    logits = F.linear(hidden, head.weight, head.bias) / temperature
    plain = -F.cross_entropy(logits, ids, reduction="none")
    wanted = torch.autograd.grad((plain * weights).sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(log_probs, plain)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy().detach())
    assert not entropy.requires_grad
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(token_log_probs(head, hidden, ids, temperature, chunk)[0], log_probs)


def test_lengths_must_be_equal() -> None:
    """The published gather accepts a shorter index (LISA_grpo.py:252-263)."""
    with pytest.raises(ValueError, match="against token_ids"):
        token_log_probs(nn.Linear(4, 5), torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
