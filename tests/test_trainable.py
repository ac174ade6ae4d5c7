"""What a run trains of the joint model: adapters, whole parts, [SEG] rows; what stays frozen."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from configs.schema import TrainableConfig
from model.aurora.model import evaluating
from model.aurora.trainable import apply_trainable, component_counts, format_counts, freeze, is_adapter
from tests.aurora_cases import (
    LORA,
    SEG,
    WHOLE,
    stir,
    three_clips,
    tiny_model,
)
from utils.errors import ConfigError


@pytest.mark.smoke
def test_published_set_of_adapters() -> None:
    """q_proj and v_proj of LM (2 layers), BEATs (2) and the mask decoder (7 attentions); not the vision tower's."""
    model = tiny_model(LORA)
    adapted = {n.split(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    parts = {part: sum(part in name for name in adapted) for part in ("language_model", "audio_tower", "mask_decoder")}
    assert parts == {"language_model": 4, "audio_tower": 4, "mask_decoder": 14} and len(adapted) == 22


@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_frozen_parts_have_no_gradient_and_stay_in_eval_mode(trainable: TrainableConfig) -> None:
    model = tiny_model(trainable).train()
    for parts in model.components:
        component = model.get_submodule(parts)
        assert component.training != model.is_frozen(parts), parts
    assert model.is_frozen("backbone.vision_tower", "segmenter.sam.image_encoder", "segmenter.sam.prompt_encoder")
    batch = three_clips()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    output = model(model.pack(batch, batch.answers), model.encode(batch))
    loss = F.cross_entropy(output.answer_logits, output.answer_labels) + output.mask_logits[:2].square().mean()
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    # the mask tokens that a single mask does not use, and the IoU head, get no gradient
    idle = r"iou_prediction_head|output_hypernetworks_mlps\.[123]|lora_A|k_proj\.bias"
    assert all(re.search(idle, name) for name in trained - moved), sorted(trained - moved)


@pytest.mark.smoke
def test_new_adapters_change_nothing() -> None:
    batch = three_clips()
    base, adapted = tiny_model().eval(), tiny_model(LORA).eval()
    adapted.text_hidden_fcs.load_state_dict(base.text_hidden_fcs.state_dict())
    with torch.no_grad():
        first, second = (m(m.pack(batch, batch.answers), m.encode(batch)) for m in (base, adapted))
    torch.testing.assert_close(first.answer_logits, second.answer_logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first.seg_features, second.seg_features, atol=1e-6, rtol=1e-5)


def test_seg_rows_alone_equal_training_the_rows_of_whole_matrices() -> None:
    """Same loss, and the gradient of the two rows is that of the [SEG] rows of fully trained matrices."""
    batch = three_clips()
    lean = tiny_model(TrainableConfig(lora_rank=0, lora_targets=(), full=(), seg_rows_only=True))
    whole = tiny_model(TrainableConfig(lora_rank=0, lora_targets=(), full=(r"embed_tokens\.", r"lm_head\.")))
    whole.text_hidden_fcs.load_state_dict(lean.text_hidden_fcs.state_dict())
    for model in (lean, whole):
        output = model(model.pack(batch, batch.answers), model.encode(batch))
        (F.cross_entropy(output.answer_logits, output.answer_labels) + output.seg_features.square().sum()).backward()
    rows, matrices = lean.backbone.language_model, whole.backbone.language_model
    for name in ("model.embed_tokens", "lm_head"):
        row = rows.get_submodule(name).seg_row.grad
        torch.testing.assert_close(row, matrices.get_submodule(name).weight.grad[SEG], atol=1e-6, rtol=1e-4)
        assert rows.get_submodule(name).weight.grad is None
    counts = {c.name: c.trainable for c in component_counts(lean)}
    assert counts["backbone.language_model"] == 2 * 64 and counts["backbone.audio_tower"] == 0


def test_patterns_that_match_nothing_are_all_reported() -> None:
    wrong = TrainableConfig(
        lora_rank=2,
        lora_targets=(r"language_model\..*q_proj$", r"\.qkv_projection$"),
        full=(r"embed_tok$", r"image_encoder"),
    )
    with pytest.raises(ConfigError) as error:
        tiny_model(wrong)
    fields = [p.field for p in error.value.problems]
    assert fields == ["trainable.lora_targets[1]", "trainable.full[0]", "trainable.full[1]"]
    assert "no gradient reaches" in str(error.value) and "matches no parameter" in str(error.value)


def test_trainables_are_chosen_once() -> None:
    with pytest.raises(RuntimeError, match="already"):
        apply_trainable(tiny_model(WHOLE), WHOLE)


def test_counts_cover_every_parameter_once() -> None:
    model = tiny_model(LORA)
    counts = component_counts(model)
    assert sum(c.total for c in counts) == sum(p.numel() for p in model.parameters())
    assert sum(c.trainable for c in counts) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "total" in format_counts(counts).splitlines()[-1]


def test_freeze_covers_adapters() -> None:
    model = tiny_model(LORA).train()
    freeze(model, "segmenter.sam.mask_decoder.")
    assert model.is_frozen("segmenter.sam.mask_decoder") and not model.segmenter.sam.mask_decoder.training
    assert any(is_adapter(n) for n, p in model.segmenter.named_parameters())


def test_evaluating_restores_the_mode() -> None:
    model = tiny_model(LORA).train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not model.backbone.language_model.training
        raise KeyError
    assert model.training and model.backbone.language_model.training and not model.backbone.vision_tower.training


@pytest.mark.smoke
def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch, gradients = three_clips(), []
    settings = LORA.model_copy(update={"lora_dropout": 0.0})
    for enabled in (False, True):
        model = tiny_model(settings).train()
        stir(model, 3)
        model.backbone.set_gradient_checkpointing(enabled)
        output = model(model.pack(batch, batch.answers), model.encode(batch))
        F.cross_entropy(output.answer_logits, output.answer_labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
