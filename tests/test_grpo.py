"""Stage 3: the shared prompt against full copies, log-probabilities against step-by-step decoding, what is trained and
logged, what steps change, and the reference policy."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.schema import TrainableConfig
from model.aurora.generation import generate
from model.aurora.model import AuroraModel
from model.backbones.videollama2.backbone import VideoLlama2
from model.objectives import policy
from model.objectives.rewards import Judged, frame_iou
from model.stages.grpo import GrpoStage, Rollouts, supervised_answers
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
from tests.grpo_cases import RAGGED, draw_ragged, given, grpo_config, make_stage, two_clips, with_advantages
from tests.oracles.plain_grpo import PlainEngine, PlainGrpoStage
from tests.test_backbone_parity import split
from utils.errors import ConfigError
from utils.results import decode_masks
from utils.types import Batch, Generation, MediaFeatures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Generation:
    return draw_ragged(monkeypatch)


def gradients(stage: GrpoStage, prepared: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    stage.model.zero_grad()
    step = stage.loss(prepared)
    step.total.backward()
    named = stage.model.named_parameters()
    return step.total.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


# ---- the shared prompt


@pytest.mark.smoke
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
    plain_stage = PlainGrpoStage(stage.config, stage.model, StubTokenizer())
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
    plain = PlainEngine(stage.model, 1.0)
    plain.batch, plain.answers = prepared.batch, drawn.token_ids
    with torch.no_grad():
        ours = stage.model(prepared.packed, prepared.media, prepared.frame_index)
        wanted = plain(prepared.packed, prepared.media, prepared.frame_index)
    for name in ("log_probs", "entropy", "seg_features", "mask_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-4, atol=2e-5, msg=name)
    assert prepared.packed.answer_of_query.tolist() == [0, 1, 3, 5] and len(ours.seg_features) == 4
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
        model.pack_group(batch, [torch.tensor([1])], 2)
    with pytest.raises(ValueError, match="answer 1 is empty"):
        model.pack_group(batch, [torch.tensor([1]), torch.tensor([], dtype=torch.long)], 1)
    ends_in_media = tiny_batch(replace(tiny_sample(0), prompt_ids=torch.tensor([5, -201])))
    with pytest.raises(ValueError, match="must end in a token of text"):
        model.pack_group(ends_in_media, [torch.tensor([1])], 1)


def test_each_clip_is_encoded_once_and_lm_head_sees_answers_alone() -> None:
    """Frozen towers and SAM's encoder: B clips in one call a step, not B * G. lm_head: a chunk of rows at a time."""
    stage = make_stage(grpo_config(WHOLE.model_copy(update={"full": (r"language_model\.",)})))
    model, seen = stage.model, {"vision": [], "audio": [], "image": [], "head": []}
    parts = {"vision": model.backbone.vision_tower, "audio": model.backbone.audio_tower,
             "image": model.segmenter.sam.image_encoder, "head": model.backbone.language_model.lm_head}  # fmt: skip
    for name, part in parts.items():
        part.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(len(inputs[0])))
    prepared = stage.prepare(two_clips())
    seen["head"].clear()  # sampling's, a row per answer
    stage.loss(prepared).total.backward()
    assert seen["vision"] == [2 * 2] and seen["audio"] == [2] and seen["image"] == [2 * 2]  # clips x frames
    answered = int(prepared.packed.mask.sum())
    assert sum(seen["head"]) == 2 * answered and max(seen["head"]) <= policy.CHUNK  # forward, again in backward


def test_a_whole_step_equals_the_plain_way() -> None:
    """G encodings, `generate(num_return_sequences=G)` and G copies: the same answers, rewards and loss at one seed."""
    stage = make_stage(grpo_config(WHOLE))
    plain = PlainGrpoStage(stage.config, stage.model, StubTokenizer())
    found = []
    for one in (stage, plain):
        torch.manual_seed(2)
        prepared = one.prepare(two_clips())
        found.append((prepared, one.loss(prepared)))
    (ours, step), (theirs, wanted) = found
    assert [a.tolist() for a in ours.answers.token_ids] == [a.tolist() for a in theirs.answers.token_ids]
    torch.testing.assert_close(ours.rewards.total, theirs.rewards.total)
    assert step.total.item() == pytest.approx(wanted.total.item(), rel=1e-5)


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
    """Released code LISA_grpo.py:252-263 reads other positions; both sets of values are stored."""
    model = AuroraModel(tiny_backbone, tiny_segmenter(), SEG).eval()
    prompt, answer = split(tiny_inputs["ids_av"][0], tiny_inputs["labels_av"][0])
    sample = replace(
        tiny_sample(0), prompt_ids=prompt, pixel_values=tiny_inputs["pixels"], fbank=tiny_inputs["fbank_short"][0]
    )
    media = MediaFeatures(
        tiny_backbone.encode_video(tiny_inputs["pixels"][None]), tiny_backbone.encode_audio(tiny_inputs["fbank_short"])
    )
    packed = model.pack_group(tiny_batch(sample), [answer, answer[:5]], 2)
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


def test_bf16(drawn: Generation) -> None:
    """The first ratio is exactly 1 in bf16 too; log-probabilities are float32 and near those of float32 weights."""
    stage = make_stage(grpo_config(WHOLE, clip_eps=1e-9, clip_eps_high=1e-9))
    wanted = with_advantages(stage.prepare(two_clips()))
    stage.loss(wanted)
    stage.model.to(torch.bfloat16)
    drawn.seg_hidden = drawn.seg_hidden.to(torch.bfloat16)
    prepared = with_advantages(stage.prepare(two_clips()))
    step = stage.loss(prepared)
    step.total.backward()
    assert stage.loss(prepared).parts["clip_fraction"].item() == 0
    assert prepared.old_log_probs.dtype == torch.float32
    apart = (prepared.old_log_probs - wanted.old_log_probs).abs().max().item()
    assert 0 < apart < 0.2
    gradients = [p.grad for p in stage.model.parameters() if p.grad is not None]
    assert gradients and all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


# ---- which masks are trained, what is logged, what is kept


def judged_of(answers: list, batch: Batch) -> list[Judged]:
    """The answers, equally many about each clip."""
    texts, group = given(answers, 8).texts, len(answers) // len(batch)
    return [
        Judged(text, batch.samples[i // group], 0.5, SEG in answer, False, len(answer))
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]


def test_which_masks_are_trained() -> None:
    judged = judged_of(RAGGED, two_clips())
    judged[0] = replace(judged[0], text="The target is dog. It is [SEG].")
    judged[2] = replace(judged[2], text="The target is dog.")
    rewards = torch.tensor([1.0, 2.0, 3.0, 1.0, 5.0, 1.0])
    wanted = {
        "all": [True, True, False, True, False, True],
        "class_correct": [True, False, False, False, False, False],
        "best": [False, True, False, True, False, False],
        "none": [False] * 6,
    }
    for rule, flags in wanted.items():
        assert supervised_answers(rule, judged, rewards, 3).tolist() == flags, rule
    nothing = judged_of([[1], [2]], tiny_batch(tiny_sample(0)))
    assert supervised_answers("best", nothing, torch.zeros(2), 2).tolist() == [False, False]


def test_scalars_and_truncation(drawn: Generation) -> None:
    stage = make_stage(grpo_config(mask_truncated=True))
    prepared = stage.prepare(two_clips())
    assert prepared.trained.tolist() == [True, False, False, True, True, True]
    parts = {k: v.item() for k, v in stage.loss(prepared).parts.items()}
    names = {"reward_all", "reward_format", "reward_iou", "reward_class", "reward_length_reward", "completion_length",
             "truncated_share", "group_std", "zero_variance_share", "supervised_share", "entropy", "clip_fraction",
             "policy_loss", "mask_bce_loss", "mask_dice_loss", "mask_loss", "loss", "sampling_gap"}  # fmt: skip
    assert set(parts) == names
    again = stage.loss(stage.prepare(two_clips())).parts  # the second time there is a time since the first
    assert set(again) == names | {"tokens_per_second"} and again["tokens_per_second"] > 0
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


def test_samples_are_kept_with_rewards_and_masks(drawn: Generation) -> None:
    """Every answer of the last batch, for samples.jsonl."""
    stage = make_stage(grpo_config(mask_loss_on="best"))
    prepared = stage.prepare(two_clips())
    records = json.loads(json.dumps(stage.records(prepared)))
    assert [(r["row"], r["sample"]) for r in records] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [r["tokens"] for r in records] == list(map(len, RAGGED))
    assert [r["mask_trained"] for r in records] == prepared.supervised.tolist()
    for number, record in enumerate(records):
        assert record["reward"] == pytest.approx(sum(record["rewards"].values()), abs=1e-3)
        assert record["reward"] == pytest.approx(prepared.rewards.total[number].item(), abs=1e-4)
        assert record["advantage"] == pytest.approx(prepared.advantages.values[number].item(), abs=1e-4)
        assert record["answer"] == prepared.answers.texts[number] and bool(record["masks"]) is record["has_seg"]
        if record["has_seg"]:
            masks = torch.from_numpy(decode_masks(record["masks"]))
            truth = prepared.batch.masks[number // 3]
            assert masks.shape == truth.shape
            assert record["rewards"]["iou"] == pytest.approx(frame_iou(masks.float() * 2 - 1, truth), abs=1e-3)


# ---- what a step and a run of steps change


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
