"""The supervised stages against their formulas, the distillation teacher, and the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import TrainableConfig
from model.aurora.model import AuroraModel
from model.aurora.trainable import MASK_DECODER, freeze
from model.aurora.trained import load_mask_decoder, load_trained, save_trained
from model.objectives.mask import MaskLosses, mask_bce, mask_dice
from model.stages import build_stage
from model.stages.base import combine, draw_frames, query_mask_losses
from model.stages.sft import SftStage, feature_distillation
from model.stages.teacher import TeacherStage
from tests.aurora_cases import (
    FRAMES,
    LORA,
    SEG,
    WHOLE,
    run_config,
    stir,
    three_clips,
    tiny_batch,
    tiny_model,
    tiny_sample,
)
from tests.tiny_run import ROOT, environment
from utils.errors import ConfigError, WeightsError
from utils.types import Batch

LORA_PLAIN = LORA.model_copy(update={"lora_dropout": 0.0})


def make_teacher(folder: Path, trainable: TrainableConfig) -> AuroraModel:
    """A teacher that moved away from its base, saved in `folder`."""
    teacher = tiny_model(trainable)
    stir(teacher, 11)
    save_trained(teacher, folder)
    return teacher.eval()


def make_student(teacher: Path, trainable: TrainableConfig, cache: str = "none", **sections: object) -> SftStage:
    model = tiny_model(trainable, cache=cache)
    stir(model, 12)
    load_mask_decoder(model, teacher)
    freeze(model, MASK_DECODER)
    config = run_config("sft", sft={"teacher_checkpoint": str(teacher)}, **sections)
    return build_stage(config, model.train())


def by_hand(model: AuroraModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy, BCE and Dice of a batch, row by row and answer by answer."""
    token_losses, bce, dice = [], [], []
    for sample in batch.samples:
        one = tiny_batch(sample)
        output = model(model.pack(one, one.answers), model.encode(one))
        token_losses.append(F.cross_entropy(output.answer_logits, sample.answer_ids, reduction="none"))
        if SEG in sample.answer_ids.tolist():
            masks = model.segmenter.upscale(output.mask_logits[0], sample.sam_size, tuple(sample.masks.shape[-2:]))
            bce.append(sum(mask_bce(masks[t][None], sample.masks[t][None]) for t in range(2)) / 2)
            dice.append(sum(mask_dice(masks[t][None], sample.masks[t][None]) for t in range(2)) / 2)
    return torch.cat(token_losses).mean(), sum(bce) / len(bce), sum(dice) / len(dice)


def test_teacher_loss_is_its_formula() -> None:
    """CE over all answer tokens + 2 BCE + 0.5 Dice over the two answers with [SEG]; parts add up to the loss."""
    model = tiny_model(WHOLE).train()
    stage = build_stage(run_config("teacher"), model)
    assert isinstance(stage, TeacherStage)
    batch = three_clips()
    step = stage.loss(stage.prepare(batch))
    ce, bce, dice = (x.squeeze() for x in by_hand(model, batch))
    parts = {name: value.item() for name, value in step.parts.items()}
    assert parts["ce_loss"] == pytest.approx(ce.item(), rel=1e-4)
    assert parts["mask_bce_loss"] == pytest.approx(2 * bce.item(), rel=1e-3)
    assert parts["mask_dice_loss"] == pytest.approx(0.5 * dice.item(), rel=1e-3)
    assert parts["mask_loss"] == pytest.approx(parts["mask_bce_loss"] + parts["mask_dice_loss"], rel=1e-6)
    assert parts["loss"] == pytest.approx(parts["ce_loss"] + parts["mask_loss"], rel=1e-6)
    assert set(parts) == {"loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_loss"}
    assert step.total.requires_grad and not any(v.requires_grad for v in step.parts.values())


def test_teacher_gradient_is_that_of_the_formula() -> None:
    model = tiny_model(WHOLE).eval()
    stage, batch = build_stage(run_config("teacher"), model), three_clips()
    names = [
        "text_hidden_fcs.0.0.weight",
        "backbone.language_model.lm_head.weight",
        "segmenter.sam.mask_decoder.mask_tokens.weight",
    ]
    parameters = [model.get_parameter(name) for name in names]
    step = stage.loss(stage.prepare(batch))
    ours = torch.autograd.grad(step.total, parameters)
    ce, bce, dice = by_hand(model, batch)
    wanted = torch.autograd.grad((ce + 2 * bce + 0.5 * dice).sum(), parameters)
    for name, a, b in zip(names, ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-2, msg=name)


def test_a_batch_without_any_seg_learns_words_alone() -> None:
    stage = build_stage(run_config("teacher"), tiny_model(WHOLE).train())
    batch = tiny_batch(tiny_sample(0, answer=(4, 5)), tiny_sample(1, answer=(6,)))
    step = stage.loss(stage.prepare(batch))
    assert step.parts["mask_loss"].item() == 0 and step.total.item() == pytest.approx(step.parts["ce_loss"].item())
    step.total.backward()


def test_chosen_frames_get_the_mask_loss() -> None:
    model = tiny_model(WHOLE).eval()
    config = run_config("teacher").model_copy(update={"stage": "teacher"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"decode_frames_per_step": 1})})
    stage, batch = build_stage(config, model), three_clips()
    prepared = stage.prepare(batch)
    assert prepared.frame_index.shape == (3, 1)
    with torch.no_grad():
        step = stage.loss(prepared)
        output = model(prepared.packed, model.encode(batch))
    bce = []
    for b in range(2):
        t = int(prepared.frame_index[b])
        masks = model.segmenter.upscale(output.mask_logits[b, t : t + 1], batch.sam_sizes[b], batch.mask_sizes[b])
        bce.append(mask_bce(masks, batch.masks[b][t : t + 1]))
    assert step.parts["mask_bce_loss"].item() == pytest.approx(2 * torch.cat(bce).mean().item(), rel=1e-3)


def test_drawn_frames_are_distinct_sorted_and_seeded() -> None:
    batch = replace(three_clips(), sam_pixels=torch.zeros(3, 10, 1, 1, 1))
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    first = draw_frames(batch, 4, cpu)
    torch.manual_seed(0)
    assert torch.equal(draw_frames(batch, 4, cpu), first) and not torch.equal(draw_frames(batch, 4, cpu), first)
    assert all(len(set(row)) == 4 and row == sorted(row) for row in first.tolist())
    assert draw_frames(batch, None, cpu) is None and draw_frames(batch, 10, cpu) is None


def test_mask_losses_of_groups_and_of_chosen_answers() -> None:
    """Queries left out count for nothing; a smaller side changes little."""
    model, batch = tiny_model().eval(), tiny_batch(tiny_sample(0), tiny_sample(1))
    answers = [torch.tensor([5, SEG]), torch.tensor([4, 3]), torch.tensor([SEG]), torch.tensor([7, 8, SEG])]
    prompts = [p for p in batch.prompts for _ in range(2)]
    with torch.no_grad():
        output = model(model.pack(batch, answers, prompts), model.encode(batch).repeat(2))
        clips = torch.tensor([0, 1, 1])  # of the answers 0, 2 and 3
        both = query_mask_losses(model, output.mask_logits, clips, batch)
        chosen = query_mask_losses(model, output.mask_logits[1:2], clips[1:2], batch)
        small = query_mask_losses(model, output.mask_logits, clips, batch, longest=15)
    wanted = [
        mask_bce(model.segmenter.upscale(low, (22, 32), batch.mask_sizes[clip]), batch.masks[clip])
        for low, clip in zip(output.mask_logits, clips.tolist(), strict=True)
    ]
    assert both.bce.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)
    assert chosen.bce.item() == pytest.approx(wanted[1].mean().item(), rel=1e-5)
    assert small.bce.item() == pytest.approx(both.bce.item(), rel=0.2) and small.bce.item() != both.bce.item()


def test_mask_losses_at_a_smaller_side() -> None:
    """`loss.mask_side` reaches the losses; without it they are those of the native size."""
    model, batch = tiny_model(WHOLE).eval(), three_clips()
    native, small = (
        build_stage(run_config("teacher", loss={"mask_side": side}), model).loss(
            build_stage(run_config("teacher"), model).prepare(batch)
        )
        for side in (None, 16)
    )
    assert small.parts["mask_loss"].item() == pytest.approx(native.parts["mask_loss"].item(), rel=0.2)
    assert small.parts["mask_loss"].item() != native.parts["mask_loss"].item()
    assert small.parts["ce_loss"].item() == native.parts["ce_loss"].item()


# ---- distillation


@pytest.mark.parametrize("trainable", [LORA_PLAIN, WHOLE], ids=["lora", "whole"])
def test_teacher_features_are_those_of_the_teacher_model(trainable: TrainableConfig, tmp_path: Path) -> None:
    """The swapped pass equals a whole second model, and leaves the student as it was, towers and caches included."""
    teacher = make_teacher(tmp_path, trainable)
    stage = make_student(tmp_path, trainable, cache="memory")
    batch, student = three_clips(), stage.model
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    student.encode(batch)
    prepared = stage.prepare(batch)
    with torch.no_grad():
        packed = teacher.pack(batch, [s.teacher_ids for s in batch.samples])
        wanted = teacher(packed, teacher.encode(batch)).seg_features
    torch.testing.assert_close(prepared.teacher_features, wanted, atol=1e-5, rtol=1e-4)
    assert not prepared.teacher_features.requires_grad
    assert student.training and all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    assert all(p.requires_grad for n, p in student.named_parameters() if n.startswith("text_hidden_fcs"))

    step = stage.loss(prepared)
    output = student(prepared.packed, student.encode(batch))
    by_hand_mse = ((output.seg_features - wanted[:2]) ** 2).mean()  # row 2 of the student has no [SEG]
    assert step.parts["distill_loss"].item() == pytest.approx(by_hand_mse.item(), rel=1e-3)
    assert step.parts["loss"].item() == pytest.approx(
        sum(step.parts[n].item() for n in ("ce_loss", "mask_loss", "distill_loss")), rel=1e-5
    )


def test_teacher_is_asked_once_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher(tmp_path, WHOLE)
    stage, batch = make_student(tmp_path, WHOLE), three_clips()
    first = stage.prepare(batch).teacher_features
    monkeypatch.setattr(stage.model, "hidden_states", lambda *_: pytest.fail("computed again"))
    turned = tiny_batch(*reversed(batch.samples))
    assert torch.equal(stage.prepare(turned).teacher_features, first.flip(0))


@pytest.mark.parametrize("shared", [True, False], ids=["frozen", "trained projector"])
def test_towers_run_once_for_teacher_and_student(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen and equal towers see each clip once a micro-batch; a trained projector makes the features two."""
    trainable = WHOLE.model_copy(update={"full": (r"language_model\.",)}) if shared else WHOLE
    teacher, batch = make_teacher(tmp_path, trainable), three_clips()
    stage = make_student(tmp_path, trainable)
    clips = {"vision_tower": 0, "audio_tower": 0}
    for name, rows_of_a_clip in (("vision_tower", FRAMES), ("audio_tower", 1)):
        tower = stage.model.backbone.get_submodule(name)

        def counted(x: Tensor, name: str = name, rows: int = rows_of_a_clip, run: object = tower.forward) -> Tensor:
            clips[name] += len(x) // rows
            return run(x)

        monkeypatch.setattr(tower, "forward", counted)
    prepared = stage.prepare(batch)
    step = stage.loss(prepared)
    assert set(clips.values()) == ({3} if shared else {6})
    with torch.no_grad():
        packed = teacher.pack(batch, [s.teacher_ids for s in batch.samples])
        wanted = teacher(packed, teacher.encode(batch)).seg_features
    torch.testing.assert_close(prepared.teacher_features, wanted, atol=1e-5, rtol=1e-4)
    prepared.media = None
    apart = stage.loss(prepared)
    head = stage.model.text_hidden_fcs[0][0].weight
    ours, theirs = (torch.autograd.grad(one.total, head)[0] for one in (step, apart))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_only_the_student_learns(tmp_path: Path) -> None:
    """Distillation reaches the [SEG] head and the language model; the frozen decoder gets nothing."""
    make_teacher(tmp_path, LORA_PLAIN)
    stage = make_student(tmp_path, LORA_PLAIN, loss={"ce": 0.0, "bce": 0.0, "dice": 0.0, "distill": 1.0})
    stage.loss(stage.prepare(three_clips())).total.backward()
    student = stage.model
    assert student.text_hidden_fcs[0][0].weight.grad.any()
    lora = [p for n, p in student.named_parameters() if "language_model" in n and "lora_B" in n]
    assert all(p.grad.any() for p in lora)
    assert all(p.grad is None for p in student.segmenter.parameters())


def test_distillation_is_the_mean_square_over_queries() -> None:
    teacher, student = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    teacher, student = teacher.clone().requires_grad_(), student.clone().requires_grad_()
    loss = feature_distillation(teacher, student)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    assert loss.item() == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / 12, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 12)
    assert teacher.grad is None
    assert feature_distillation(teacher[:0], student[:0]).item() == 0  # no query: no distance
    with pytest.raises(ValueError, match="prompt width"):
        feature_distillation(torch.zeros(1, 3), torch.zeros(1, 4))


def test_a_student_equal_to_its_teacher_has_no_distance(tmp_path: Path) -> None:
    make_teacher(tmp_path, WHOLE)
    stage = make_student(tmp_path, WHOLE)
    load_trained(stage.model, tmp_path)
    stage.model.eval()
    batch = three_clips()
    same = tiny_batch(*(replace(s, answer_ids=s.teacher_ids) for s in batch.samples))
    assert stage.loss(stage.prepare(same)).parts["distill_loss"].item() < 1e-9


def test_faulty_teachers_are_refused(tmp_path: Path) -> None:
    make_teacher(tmp_path, LORA_PLAIN)
    with pytest.raises(WeightsError, match="lora_rank is 2 there and 0 here"):
        build_stage(run_config("sft", sft={"teacher_checkpoint": str(tmp_path)}), tiny_model(WHOLE))
    config = run_config("sft")
    broken = config.model_copy(update={"sft": config.sft.model_copy(update={"teacher_checkpoint": None})})
    with pytest.raises(ConfigError, match="needs a teacher"):
        build_stage(broken, tiny_model(WHOLE))
    stage = make_student(tmp_path, LORA_PLAIN)
    empty = replace(tiny_sample(4), teacher_ids=torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="rows 4 have no teacher_ids"):
        stage.prepare(tiny_batch(empty))


def test_no_teacher_without_distillation() -> None:
    config = run_config(
        "sft",
        loss={"distill": 0.0},
        sft={"teacher_checkpoint": None, "student_start": "init_from", "freeze_mask_decoder": False},
        trainable=WHOLE.model_dump(),
    )
    stage = build_stage(config, tiny_model(WHOLE))
    assert stage.teacher is None
    assert "distill_loss" not in stage.loss(stage.prepare(three_clips())).parts


# ---- stages by name


def test_unknown_stages() -> None:
    with pytest.raises(ValueError, match="must be one of teacher, sft, reflective, grpo"):
        build_stage(run_config("teacher").model_copy(update={"stage": "eval"}), tiny_model(WHOLE))


def test_weights_apply_to_their_terms() -> None:
    weights = run_config("sft", loss={"ce": 2.0, "bce": 3.0, "dice": 5.0, "distill": 7.0}).loss
    one = torch.tensor(1.0)
    step = combine(weights, one, MaskLosses(one, one), one)
    assert {k: v.item() for k, v in step.parts.items()} == {
        "loss": 17.0, "ce_loss": 2.0, "mask_bce_loss": 3.0, "mask_dice_loss": 5.0, "mask_loss": 8.0, "distill_loss": 7.0
    }  # fmt: skip


# ---- through the engine


@pytest.mark.parametrize(
    ("stage", "zero_stage", "precision", "loss_error", "apart"),
    [("teacher", 3, "fp32", 1e-5, 2e-4), ("sft", 2, "fp32", 1e-5, 2e-4), ("sft", 2, "bf16", 2e-2, 1e-2)],
)
def test_engine_equals_the_bare_model(
    stage: str, zero_stage: int, precision: str, loss_error: float, apart: float, tmp_path: Path
) -> None:
    """Towers run outside the engine's forward, the teacher swaps tensors, checkpointing is on: ZeRO must not mind."""
    make_teacher(tmp_path, LORA_PLAIN)
    command = [sys.executable, "-m", "tests.engine_case", stage, str(zero_stage), precision, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["engine"] == pytest.approx(found["bare"], rel=loss_error)
    assert found["apart"] < apart
    assert found["engine"][0] > found["engine"][-1]
