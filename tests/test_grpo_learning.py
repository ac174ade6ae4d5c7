"""Stage 3: what a step and a run of steps change, and the reference policy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.aurora.generation import generate
from model.stages.grpo import GrpoStage
from tests.aurora_cases import LORA, VOCABULARY, WHOLE, StubTokenizer, stir, tiny_batch, tiny_model, tiny_sample
from tests.grpo_cases import draw_ragged, grpo_config, make_stage, two_clips, with_advantages
from utils.errors import ConfigError
from utils.types import Generation


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Generation:
    return draw_ragged(monkeypatch)


def test_a_bandit_is_solved() -> None:
    """Two words, four clips, the right word depends on the clip: greedy accuracy from chance to 1."""
    torch.manual_seed(0)
    trainable = WHOLE.model_copy(update={"mask_decoder": False, "seg_head": False, "full": (r"lm_head",)})
    weights = {"right_token": 1.0}
    config = grpo_config(
        trainable, mask_loss_on="none", group_size=8, max_new_tokens=1, reward_weights=weights,
        reward_module="tests.grpo_cases:right_token",
    )  # fmt: skip
    stage = make_stage(config)
    model, batch = stage.model, tiny_batch(*(tiny_sample(row) for row in range(4)))
    width = model.backbone.language_model.lm_head.in_features
    head = nn.Linear(width, VOCABULARY)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-30.0)
        head.bias[[10, 20]] = 0.0
    model.backbone.language_model.lm_head = head
    model.eval()
    media = model.encode(batch)

    def accuracy() -> float:
        texts = generate(model, batch, media, StubTokenizer(), 1).texts
        return sum(text == ("w10", "w20")[row % 2] for row, text in enumerate(texts)) / 4

    assert accuracy() == 0.5
    optimizer = torch.optim.AdamW([head.weight], lr=0.02, weight_decay=0.0)
    rewards = []
    for _ in range(40):
        prepared = stage.prepare(batch)
        step = stage.loss(prepared)
        optimizer.zero_grad()
        step.total.backward()
        optimizer.step()
        rewards.append(step.parts["reward_all"].item())
    assert accuracy() == 1.0
    assert rewards[0] < 0.75 < 0.9 < sum(rewards[-5:]) / 5


def test_a_step_raises_what_was_better(drawn: Generation) -> None:
    """Log-probability of answers rises with a positive advantage and falls with a negative one."""
    stage = make_stage(grpo_config(WHOLE, mask_loss_on="none"))
    prepared = with_advantages(stage.prepare(two_clips()))
    parameters = [p for p in stage.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    stage.loss(prepared).total.backward()
    optimizer.step()
    with torch.no_grad():
        after = stage.model(prepared.packed, prepared.media).log_probs
    change = (after - prepared.old_log_probs).sum(1) / prepared.packed.mask.sum(1)
    assert (change * prepared.advantages.values).sum() > 0
    assert change[0] > 0 and change[4] < 0


def test_several_updates_keep_the_old_policy(drawn: Generation) -> None:
    stage = make_stage(grpo_config(WHOLE, mask_loss_on="none", updates_per_batch=2))
    prepared = with_advantages(stage.prepare(two_clips()))
    stage.loss(prepared)
    old = prepared.old_log_probs.clone()
    stir(stage.model, 3)
    moved = stage.loss(prepared)
    assert torch.equal(prepared.old_log_probs, old) and moved.parts["clip_fraction"] > 0
    assert not moved.parts["policy_loss"].isnan()


# ---- the reference policy


def test_kl_to_the_start(drawn: Generation) -> None:
    """0 at the start, positive after a move; its gradient is that of k3 by finite differences of the total."""
    stage = make_stage(grpo_config(LORA, beta=0.5, mask_loss_on="none"))
    prepared = with_advantages(stage.prepare(two_clips()))
    assert stage.loss(prepared).parts["kl"].abs().item() < 1e-9
    stir(stage.model, 4)
    again = with_advantages(stage.prepare(two_clips()))
    torch.testing.assert_close(again.reference, prepared.reference)
    step = stage.loss(again)
    difference = (again.reference - again.old_log_probs).masked_fill(~again.packed.mask, 0)
    k3 = difference.exp() - difference - 1
    by_hand = (k3.sum(1) / again.packed.mask.sum(1)).mean()
    assert step.parts["kl"].item() == pytest.approx(by_hand.item(), rel=1e-5) and by_hand > 1e-4
    assert step.total.item() == pytest.approx(step.parts["policy_loss"].item() + 0.5 * by_hand.item(), rel=1e-5)


def test_no_reference_at_beta_zero() -> None:
    assert make_stage(grpo_config()).reference is None


def test_reference_needs_whole_parameters() -> None:
    model = tiny_model(LORA)
    next(p for p in model.parameters() if p.requires_grad).ds_id = 0
    with pytest.raises(ConfigError, match="needs whole parameters"):
        GrpoStage(grpo_config(LORA, beta=0.1), model, StubTokenizer())
