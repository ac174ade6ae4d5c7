"""The released checkpoint's shape at tiny size: DeepSpeed's file, peft 0.4 names, fewer rows; converted, it answers as
the model that it was made of."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import RunConfig, TrainableConfig
from dataset.prompt import load_tokenizer
from model.aurora.build import build_model
from model.aurora.model import AuroraModel
from model.aurora.trainable import apply_trainable
from model.aurora.trained import read_trained
from model.backbones.videollama2.weights import load_backbone, to_released
from scripts.convert_aurora import BACKBONE, PARTS, REPORT, TARGETS, main, our_name, read_released
from tests.aurora_cases import BASE, SAM_SIDE, stir, tiny_batch, tiny_sample, tiny_segmenter
from tests.aurora_cases import SAM as SIZES
from tests.data_builders import write_tokenizer
from tests.test_weights import Bomb
from utils.config import load_config
from utils.tensor_files import TensorFileError

RELEASED = TrainableConfig(lora_rank=2, lora_alpha=16.0, lora_targets=TARGETS)
"""What the released trainer trains: three sets of adapters, vocabulary, head, decoder."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.npz", "lisa_head"))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def parts(base: Path) -> Namespace:
    """A trained model of the released kind, its file, and what the converter is given."""
    folder = base.parent
    SIZES.to_json(folder / "sam.json")
    save_file(tiny_segmenter().sam.state_dict(), folder / "sam.safetensors")
    _, seg_id = load_tokenizer(base)
    model = AuroraModel(load_backbone(base)[0], tiny_segmenter(), seg_id)
    own = [m.weight.detach().clone() for m in matrices(model)]
    apply_trainable(model, RELEASED)
    stir(model, seed=5)
    with torch.no_grad():  # the released matrices end with [SEG]; behind it stands the base
        for module, rows in zip(matrices(model), own, strict=True):
            module.weight[seg_id + 1 :] = rows[seg_id + 1 :]
    file = folder / "mp_rank_00_model_states.pt"
    write_released(file, released_state(model))
    arguments = [str(file), str(folder / "out"), "--base", str(base), "--sam", str(folder / "sam.safetensors")]
    arguments += ["--sam-type", str(folder / "sam.json"), "--sam-image-size", str(SAM_SIDE)]
    return Namespace(model=model.eval(), seg_id=seg_id, file=file, out=folder / "out", arguments=arguments, base=base)


def matrices(model: AuroraModel) -> list[torch.nn.Module]:
    return [model.backbone.language_model.model.embed_tokens, model.backbone.language_model.lm_head]


def released_state(model: AuroraModel) -> dict[str, Tensor]:
    """State dict as the released trainer's engine saves it: rows cut to the tokenizer's length."""
    state = {released_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    table = next(name for name in state if "relative_attention_bias" in name)
    for layer in range(1, model.backbone.config.beats.encoder_layers):
        state[table.replace("layers.0.", f"layers.{layer}.")] = state[table].clone()
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        state[name] = state[name][: model.seg_token_id + 1].clone()
    return state


def write_released(file: Path, state: dict[str, Tensor]) -> None:
    """What DeepSpeed puts around the state dict."""
    shapes = [{name: tensor.shape for name, tensor in state.items()}]
    around = {"buffer_names": [], "optimizer": None, "param_shapes": shapes, "ds_version": "0.14.4",
              "skipped_steps": 0, "global_steps": 500, "sparse_tensor_module_names": set(),
              "ds_config": {"bf16": {"enabled": True}}}  # fmt: skip
    torch.save({"module": state, **around}, file)


@torch.no_grad()
def outputs(model: AuroraModel) -> tuple[Tensor, Tensor]:
    batch = tiny_batch(tiny_sample(0, answer=(5, 6, model.seg_token_id, 7, 8)))
    output = model.eval()(model.pack(batch, batch.answers), model.encode(batch))
    return output.answer_logits, output.mask_logits


def released_name(name: str) -> str:
    """The inverse of `our_name` (the shared position table under its first layer)."""
    name = name.replace(".base_layer.", ".")
    for released, ours in PARTS:
        if name.startswith(ours):
            return f"base_model.model.{released}{name.removeprefix(ours)}"
    return f"base_model.model.{to_released(name.removeprefix(BACKBONE), 1)[0]}"


def test_names_of_the_released_checkpoint() -> None:
    """Written out, one of each kind."""
    pairs = {
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight":
            "backbone.language_model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.3.self_attn.q_proj.weight":
            "backbone.language_model.model.layers.3.self_attn.q_proj.weight",
        "base_model.model.lm_head.weight": "backbone.language_model.lm_head.weight",
        "base_model.model.model.vision_tower.vision_tower.vision_model.head.probe":
            "backbone.vision_tower.siglip.head.probe",
        "base_model.model.model.audio_tower.encoder.layers.0.self_attn.v_proj.lora_B.default.weight":
            "backbone.audio_tower.encoder.layers.0.self_attn.v_proj.lora_B.default.weight",
        "base_model.model.model.mm_projector_a.0.bias": "backbone.mm_projector_a.0.bias",
        "base_model.model.model.visual_model.mask_decoder.iou_token.weight":
            "segmenter.sam.mask_decoder.iou_token.weight",
        "base_model.model.model.text_hidden_fcs.0.2.bias": "text_hidden_fcs.0.2.bias",
    }  # fmt: skip
    for released, ours in pairs.items():
        assert our_name(released) == ours and our_name(f"module.{released}") == ours
        assert released_name(ours) == released
    table = "base_model.model.model.audio_tower.encoder.layers.{}.self_attn.relative_attention_bias.weight"
    assert {our_name(table.format(i)) for i in range(12)} == {released_and_back(table.format(0))}


def released_and_back(name: str) -> str:
    assert released_name(our_name(name)) == name
    return our_name(name)


def test_converted_model_answers_as_the_original(parts: Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(parts.arguments) == 0
    text = capsys.readouterr().out
    rows = parts.seg_id + 1
    assert f"rows: {rows} of the file, then {600 - rows} of the base; [SEG] = {parts.seg_id}" in text
    report = json.loads((parts.out / REPORT).read_text())
    fates = {(entry["part"], entry["fate"]) for entry in report["tensors"]}
    assert fates >= {("language_model", "adapter"), ("language_model", "same"), ("vision_tower", "same"),
                     ("audio_tower", "adapter"), ("sam", "adapter"), ("sam", "trained"), ("sam", "same"),
                     ("text_hidden_fcs", "trained")}  # fmt: skip
    assert not report["changed"] and not report["unknown"] and report["rows"] == [rows, 600]

    saved = load_config(parts.out / "config.yaml")
    assert saved.trainable.lora_targets == TARGETS and saved.trainable.lora_alpha == 16.0
    evaluation = {"stage": "eval", "model": saved.model.model_dump(), "engine": {"precision": "fp32"}}
    config = RunConfig.model_validate(evaluation | {"eval": {"checkpoint": str(parts.out)}})
    tokenizer, seg_id = load_tokenizer(parts.base)
    model = build_model(config, len(tokenizer), seg_id)
    for found, wanted in zip(outputs(model), outputs(parts.model), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    embedding = model.backbone.language_model.model.embed_tokens.weight
    assert embedding.shape == (600, 64)
    own = load_file(parts.base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[rows:], own[rows:])


def test_frozen_weights_within_rounding_are_dropped_and_changed_ones_kept(
    parts: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released_state(parts.model)
    vision = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    projector = "base_model.model.model.mm_projector.readout.0.weight"
    state[vision] = state[vision].half().float()
    state[projector] = state[projector] + 1
    write_released(parts.file, state)
    assert main(parts.arguments) == 0
    text = capsys.readouterr().out
    assert re.search(r"vision_tower +same to rounding +1", text) and "changed though frozen: 1" in text
    trained = read_trained(parts.out)
    assert "backbone.mm_projector.readout.0.weight" in trained.tensors
    assert not any("vision_tower" in name for name in trained.tensors)


def test_a_file_of_trained_parts_alone_is_enough(parts: Namespace) -> None:
    """As DeepSpeed saves with exclude_frozen_parameters."""
    words = ("lora_", "embed_tokens", "lm_head", "mask_decoder", "text_hidden_fcs")
    write_released(parts.file, {k: x for k, x in released_state(parts.model).items() if any(w in k for w in words)})
    assert main(parts.arguments) == 0


@pytest.mark.parametrize("fault", ["unknown", "other sam", "rows", "seg", "several ranks", "no module", "code"])
def test_faults_are_named_and_nothing_is_written(
    fault: str, parts: Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released_state(parts.model)
    head = "base_model.model.lm_head.weight"
    encoder = "base_model.model.model.visual_model.image_encoder.neck.0.weight"
    queries = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    if fault == "unknown":
        state["base_model.model.model.region_encoder.weight"] = torch.zeros(3)
        words = "without a place: 1.*region_encoder"
    elif fault == "other sam":
        state[encoder] = state[encoder] + 1
        words = "image_encoder.neck.0.weight .not that of the SAM file"
    elif fault == "rows":
        state[head] = torch.zeros(700, 64)
        words = "lm_head.weight has 700 rows, the base 600.*Remedy: give the base"
    elif fault == "seg":
        for name in (head, "base_model.model.model.embed_tokens.weight"):
            state[name] = torch.zeros(parts.seg_id, 64)
        words = "Remedy: use the tokenizer that the checkpoint was trained with"
    elif fault == "several ranks":
        state[queries] = torch.zeros(3, 64)
        words = r"adapters of several ranks: \[2, 3\]"
    elif fault == "code":
        state[head] = Bomb(parts.out.with_name("ran"))
        words = "mp_rank_00_model_states.pt: refused, .*could run code"
    else:
        words = "no `module` with names and tensors"
    write_released(parts.file, state)
    if fault == "no module":
        torch.save({"module": [1]}, parts.file)
    assert main(parts.arguments) == 1
    captured = capsys.readouterr()
    assert re.search(words, captured.out + captured.err, re.DOTALL)
    assert not parts.out.exists() and not parts.out.with_name("ran").exists()


def test_a_truncated_file_is_said(parts: Namespace) -> None:
    parts.file.write_bytes(parts.file.read_bytes()[:-2000])
    with pytest.raises(TensorFileError, match="truncated torch file"):
        read_released(parts.file)
