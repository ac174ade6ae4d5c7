"""Stage 3: the shared prompt against full copies, the policy against step-by-step decoding, and what must not hang."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.schema import TrainableConfig
from model.aurora.generation import generate
from model.aurora.group import pack_group
from model.aurora.model import AuroraModel
from model.objectives.policy import token_log_probs
from model.stages import grpo
from model.stages.grpo import GrpoStage, Rollouts, supervised_answers
from model.videollama2.backbone import VideoLlama2
from tests.aurora_cases import (
    LORA,
    SEG,
    STOP,
    VOCABULARY,
    WHOLE,
    StubTokenizer,
    stir,
    tiny_batch,
    tiny_model,
    tiny_sample,
    tiny_segmenter,
)
from tests.grpo_cases import CASES, RAGGED, PlainEngine, given, grpo_config, make_stage, two_clips
from tests.test_backbone_parity import split
from tests.tiny_run import ROOT, environment
from utils.errors import ConfigError
from utils.types import Generation, MediaFeatures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Generation:
    """Two clips, three ragged answers each, put in the place of sampling."""
    answers = given(RAGGED, 64)
    monkeypatch.setattr(grpo, "generate", lambda *_, **__: answers)
    return answers


def with_advantages(prepared: Rollouts) -> Rollouts:
    values = torch.tensor([1.0, -0.5, -0.7, 0.3, -1.2, 0.8])
    return replace(prepared, advantages=replace(prepared.advantages, values=values))


def gradients(stage: GrpoStage, prepared: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    stage.model.zero_grad()
    step = stage.loss(prepared)
    step.total.backward()
    named = stage.model.named_parameters()
    return step.total.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


# ---- the shared prompt


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_shared_prompt_equals_full_copies(
    trainable: TrainableConfig, checkpointing: bool, drawn: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient to 1e-5 relative: ragged answers, prompts of unequal length, LoRA on BEATs too."""
    stage = make_stage(grpo_config(trainable, checkpointing, temperature=0.7))
    stir(stage.model, 5)
    # Draws of the frames with a mask loss must be the same twice.
    torch.manual_seed(1)
    prepared = with_advantages(stage.prepare(two_clips()))
    loss, fast = gradients(stage, prepared)
    plain_stage = GrpoStage(stage.config, PlainEngine(stage.model, prepared.batch, drawn, 0.7), StubTokenizer())
    plain_loss, plain = gradients(plain_stage, replace(prepared, old_log_probs=None))
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    assert fast.keys() == plain.keys() and len(fast) > 20
    apart = math.sqrt(sum((fast[n] - plain[n]).square().sum().item() for n in plain))
    assert apart < 1e-5 * math.sqrt(sum(g.square().sum().item() for g in plain.values()))
    largest = max(g.abs().max().item() for g in plain.values())
    for name, wanted in plain.items():
        bound = 1e-5 * wanted.norm().item() + 1e-7 * largest
        assert (fast[name] - wanted).norm().item() < bound + 1e-6 * wanted.norm().item(), name


def test_outputs_equal_full_copies(drawn: Generation) -> None:
    """Log-probabilities, entropies, [SEG] features and masks, one by one."""
    stage = make_stage(grpo_config())
    prepared = stage.prepare(two_clips())
    plain = PlainEngine(stage.model, prepared.batch, drawn, 1.0)
    with torch.no_grad():
        ours = stage.model(prepared.packed, prepared.media, prepared.frame_index)
        wanted = plain(prepared.packed, prepared.media, prepared.frame_index)
    for name in ("log_probs", "entropy", "seg_features", "mask_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-4, atol=2e-5, msg=name)
    assert torch.equal(ours.has_seg, wanted.has_seg) and ours.has_seg.tolist() == [True, True, False, True, False, True]
    assert prepared.packed.token_ids.shape[1] == max(map(len, RAGGED))


def test_train_mode_is_refused(drawn: Generation) -> None:
    """transformers would drop the cache of a checkpointed layer with no more than a log line."""
    stage = make_stage(grpo_config())
    prepared = stage.prepare(two_clips())
    stage.model.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        stage.model(prepared.packed, prepared.media)


def test_groups_that_do_not_fit() -> None:
    model, batch = tiny_model(), two_clips()
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        pack_group(model, batch, [torch.tensor([1])], 2, token_log_probs)
    with pytest.raises(ValueError, match="answer 1 is empty"):
        pack_group(model, batch, [torch.tensor([1]), torch.tensor([], dtype=torch.long)], 1, token_log_probs)
    ends_in_media = tiny_batch(replace(tiny_sample(0), prompt_ids=torch.tensor([5, -201])))
    with pytest.raises(ValueError, match="must end in a token of text"):
        pack_group(model, ends_in_media, [torch.tensor([1])], 1, token_log_probs)


# ---- log-probabilities


def test_log_probs_equal_step_by_step_decoding() -> None:
    """What sampling saw token by token is what scoring sees at once."""
    torch.manual_seed(0)
    stage = make_stage(grpo_config(temperature=0.8))
    prepared = stage.prepare(two_clips())
    step = stage.loss(prepared)
    seen = torch.cat(prepared.answers.log_probs)
    torch.testing.assert_close(prepared.old_log_probs[prepared.packed.mask], seen, rtol=0, atol=2e-5)
    assert step.parts["sampling_gap"].item() < 1e-5


def test_the_fixtures_right_log_probs_and_not_the_published_ones(
    tiny_backbone: VideoLlama2, tiny_inputs: dict, tiny_expected: dict
) -> None:
    """Published code LISA_grpo.py:252-263 reads other positions; both sets of values are stored."""
    model = AuroraModel(tiny_backbone, tiny_segmenter(), SEG).eval()
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    sample = replace(
        tiny_sample(0), prompt_ids=prompt, pixel_values=tiny_inputs["pixels"], fbank=tiny_inputs["fbank_short"][0]
    )
    media = MediaFeatures(
        tiny_backbone.encode_video(tiny_inputs["pixels"][None]), tiny_backbone.encode_audio(tiny_inputs["fbank_short"])
    )
    packed = pack_group(model, tiny_batch(sample), [answer, answer[:5]], 2, token_log_probs)
    with torch.no_grad():
        found = model(packed, media).log_probs
    torch.testing.assert_close(found[0], tiny_expected["grpo_logps_correct"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1, :5], tiny_expected["grpo_logps_correct"][:5], rtol=0, atol=1e-4)
    assert (found[0] - tiny_expected["grpo_logps_reference_buggy"]).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one(checkpointing: bool, drawn: Generation) -> None:
    """Dropout of 0.5 is configured and off; a second pass over the same weights gives the same bits."""
    stage = make_stage(grpo_config(LORA, checkpointing, clip_eps=1e-9, clip_eps_high=1e-9, mask_loss_on="none"))
    prepared = with_advantages(stage.prepare(two_clips()))
    stage.model.train()  # as an engine would
    first, old = stage.loss(prepared), prepared.old_log_probs
    again = stage.loss(prepared)
    ratio = (stage.model(prepared.packed, stage.model.encode(prepared.batch)).log_probs - old).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    for step in (first, again):
        assert step.parts["clip_fraction"].item() == 0
        assert step.parts["policy_loss"].item() == pytest.approx(-prepared.advantages.values.mean().item(), abs=1e-6)
    assert not any(module.training for module in stage.model.modules())


# ---- what is learned


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


# ---- masks and scalars


def test_which_masks_are_trained() -> None:
    answers = given(RAGGED, 8)
    answers.texts[0] = "The target is dog. It is [SEG]."
    answers.texts[2] = "The target is dog."
    rewards = torch.tensor([1.0, 2.0, 3.0, 1.0, 5.0, 1.0])
    wanted = {
        "all": [True, True, False, True, False, True],
        "class_correct": [True, False, False, False, False, False],
        "best": [False, True, False, True, False, False],
        "none": [False] * 6,
    }
    for rule, flags in wanted.items():
        assert supervised_answers(rule, two_clips(), answers, rewards, 3).tolist() == flags, rule
    nothing = given([[1], [2]], 8)
    assert supervised_answers("best", tiny_batch(tiny_sample(0)), nothing, torch.zeros(2), 2).tolist() == [False, False]


def test_scalars_and_truncation(drawn: Generation) -> None:
    stage = make_stage(grpo_config(mask_truncated=True))
    prepared = stage.prepare(two_clips())
    assert prepared.trained.tolist() == [True, False, False, True, True, True]
    parts = {k: v.item() for k, v in stage.loss(prepared).parts.items()}
    names = {"reward_all", "reward_format", "reward_iou", "reward_class", "reward_length_reward", "completion_length",
             "truncated_share", "group_std", "zero_variance_share", "supervised_share", "entropy", "clip_fraction",
             "policy_loss", "mask_bce_loss", "mask_dice_loss", "mask_loss", "loss", "sampling_gap"}  # fmt: skip
    assert set(parts) == names
    assert parts["completion_length"] == pytest.approx(sum(map(len, RAGGED)) / 6)
    assert parts["truncated_share"] == pytest.approx(2 / 6) and parts["zero_variance_share"] == 0
    assert parts["reward_length_reward"] == pytest.approx(sum(map(len, RAGGED)) / 24)
    assert parts["loss"] == pytest.approx(parts["policy_loss"] + parts["mask_loss"], rel=1e-6)
    assert 0 < parts["entropy"] <= math.log(VOCABULARY)


def test_equal_rewards_leave_only_the_masks(drawn: Generation) -> None:
    config = grpo_config(WHOLE, reward_module=None, reward_weights={"format": 1.0})
    stage = make_stage(config)
    prepared = stage.prepare(two_clips())
    step = stage.loss(prepared)
    step.total.backward()
    assert step.parts["zero_variance_share"].item() == 1 and step.parts["policy_loss"].item() == 0
    head = stage.model.backbone.language_model.lm_head.weight.grad
    assert head.abs().max() == 0 and stage.model.text_hidden_fcs[0][0].weight.grad.abs().max() > 0


def test_stop_token_is_scored(drawn: Generation) -> None:
    """<|im_end|> belongs to the answer: its probability is trained too."""
    packed = make_stage(grpo_config()).prepare(two_clips()).packed
    assert (packed.targets == STOP).sum() == sum(STOP in answer for answer in RAGGED)


# ---- two processes


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_degenerate_cases_in_two_processes(zero_stage: int) -> None:
    """Finite losses, equal weights afterwards and no process that waits for ever."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.grpo_cases", str(zero_stage)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CASES.keys()
    for name, result in found.items():
        assert result["same"] and result["finite"], name
        for losses in result["losses"]:
            assert all(math.isfinite(x) for step in losses for x in step.values()), name
    mine, other = (losses[0] for losses in found["one process ends early"]["losses"])
    assert mine["completion_length"] == 1 and other["completion_length"] > 3
    for losses in found["equal rewards"]["losses"]:
        assert all(step["zero_variance_share"] == 1 and step["policy_loss"] == 0 for step in losses)
    for losses in found["all cut off"]["losses"]:
        assert all(step["truncated_share"] == 1 and step["policy_loss"] == 0 for step in losses)
    for losses in found["no seg at all"]["losses"]:
        assert all(step["mask_loss"] == 0 for step in losses)
    mine, other = (losses[0]["mask_loss"] for losses in found["seg in one process"]["losses"])
    assert mine == 0 and other > 0
