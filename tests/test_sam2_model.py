"""SAM 2 in the joint model: stages, kept features, groups, light checkpoints and exports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Sam2ImageProcessor

from configs.schema import ModelConfig, TrainableConfig
from dataset.processor import AuroraProcessor
from model.aurora.build import build_meta_model, build_model
from model.aurora.export import from_pretrained, save_pretrained
from model.aurora.features import FeatureCache, tower_fingerprint
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.aurora.trainable import apply_trainable
from model.aurora.trained import load_trained, read_trained, save_trained
from model.backbones.videollama2.weights import load_backbone
from model.stages import build_stage
from scripts import check_weights
from scripts.plan_memory import (
    SAM2_FROZEN,
    SAM2_MEMORY,
    SAM2_TRAINED,
    Machine,
    decoder_saves,
    make_plan,
    meta_model,
)
from tests.aurora_cases import BASE, SEG, VOCABULARY, StubTokenizer, run_config, stir
from tests.sam2_cases import SIDE, clips, save_sam2, settings, tiny_segmenter2
from tests.tiny_run import ROOT, environment
from utils.config import load_config
from utils.errors import ConfigError
from utils.evaluation import evaluation_facts

TRAINED = TrainableConfig(lora_rank=2, lora_targets=(r"language_model.*q_proj",), full=(), lora_dropout=0.0)
MEMORY = (r"sam\.memory_(attention|encoder)\.", r"sam\.object_pointer_proj\.")


def aurora(memory: str = "none", trainable: TrainableConfig | None = TRAINED, seed: int = 0) -> AuroraModel:
    model = AuroraModel(load_backbone(BASE)[0], tiny_segmenter2(memory, seed), SEG)
    if trainable is not None:
        apply_trainable(model, trainable)
    return model


@pytest.mark.parametrize("memory", ["none", "first", "every"])
def test_a_stage_trains_it_and_the_loss_falls(memory: str) -> None:
    model = aurora(memory, TRAINED.model_copy(update={"full": MEMORY if memory != "none" else ()})).train()
    stage, batch = build_stage(run_config("teacher"), model), clips()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(25):
        step = stage.loss(stage.prepare(batch))
        optimiser.zero_grad()
        step.total.backward()
        optimiser.step()
        losses.append((step.parts["mask_loss"].item(), step.parts["ce_loss"].item()))
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < losses[0][1]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained.keys()
    assert any("sam.memory_attention" in name for name in moved) == (memory != "none")
    assert "segmenter.sam.mask_decoder.mask_tokens.weight" in moved
    assert not any("conv_s" in name or "vision_encoder" in name or "prompt_encoder" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "precision", "loss_error", "apart"),
    [(2, "fp32", 1e-5, 2e-4), (3, "fp32", 2e-5, 1e-3), (2, "bf16", 2e-2, 1e-2)],
)
def test_the_engine_takes_the_steps_of_the_bare_model(
    zero_stage: int, precision: str, loss_error: float, apart: float, tmp_path: Path
) -> None:
    """With memory, whose parameters belong to no module that ZeRO hooks; the light checkpoint holds what it trained."""
    command = [sys.executable, "-m", "tests.engine_case", "teacher", str(zero_stage), precision, str(tmp_path), "every"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["engine"] == pytest.approx(found["bare"], rel=loss_error)
    assert found["apart"] < apart and found["engine"][0] > found["engine"][-1]


def test_what_no_gradient_reaches_is_refused() -> None:
    for memory, pattern in (("every", "sam.vision_encoder"), ("every", "conv_s0"), ("none", "sam.memory_attention")):
        with pytest.raises(ConfigError, match="no gradient reaches"):
            aurora(memory, TRAINED.model_copy(update={"full": (pattern,)}))


@torch.no_grad()
def test_features_are_kept_flat_and_by_their_weights(tmp_path: Path) -> None:
    model, batch = aurora("every").eval(), clips()
    model.feature_cache = FeatureCache("disk", tmp_path, lambda tower: tower_fingerprint(model, tower))
    first, again = model.encode(batch), model.encode(batch)
    assert first.image_embeddings.shape == (3, 2, model.segmenter.feature_size)
    torch.testing.assert_close(again.image_embeddings, first.image_embeddings, atol=0, rtol=0)
    torch.testing.assert_close(model.segmenter.encode(batch.sam_pixels), first.image_embeddings, atol=1e-5, rtol=0)
    print_before = tower_fingerprint(model, "image_encoder")
    for name, changes in (("mask_decoder.conv_s0.weight", True), ("memory_attention.layer_norm.weight", False)):
        parameter = model.segmenter.sam.get_parameter(name)
        stored = parameter.clone()
        parameter.add_(1)
        assert (tower_fingerprint(model, "image_encoder") != print_before) == changes
        parameter.copy_(stored)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["none", "every"])
def test_a_group_has_the_masks_of_its_answers_one_by_one(memory: str) -> None:
    model, batch = aurora(memory).eval(), clips()
    answers = [sample.answer_ids for sample in batch.samples for _ in range(2)]
    media = model.encode(batch)
    shared = model(model.pack_group(batch, answers, 2), media)
    prompts = [p for p in batch.prompts for _ in range(2)]
    plain = model(model.pack(batch, answers, prompts), media.repeat(2))
    torch.testing.assert_close(shared.mask_logits, plain.mask_logits, atol=1e-4, rtol=1e-4)
    found = predict(model, batch, StubTokenizer(), 4)
    assert [p.mask_logits.shape for p in found] == [masks.shape for masks in batch.masks]


def test_a_light_checkpoint_holds_decoder_and_memory_alone_and_comes_back(tmp_path: Path) -> None:
    trainable = TRAINED.model_copy(update={"full": MEMORY})
    model, batch = aurora("every", trainable), clips()
    stir(model, 5)
    save_trained(model.eval(), tmp_path)
    names = {name.removeprefix("segmenter.sam.") for name in read_trained(tmp_path).tensors if "segmenter" in name}
    parts = {name.split(".")[0] for name in names}
    assert parts == {"mask_decoder", "memory_attention", "memory_encoder", "object_pointer_proj"}
    other = aurora("every", trainable).eval()

    @torch.no_grad()
    def masks(model: AuroraModel) -> Tensor:
        return model(model.pack(batch, batch.answers), model.encode(batch)).mask_logits

    assert (masks(other) - masks(model)).abs().max() > 1e-3
    load_trained(other, tmp_path)
    torch.testing.assert_close(masks(other), masks(model), atol=0, rtol=0)


def run(tmp_path: Path, **model: object) -> ModelConfig:
    return settings(save_sam2(tmp_path / "sam2")).model_copy(update={"base": str(BASE), **model})


def test_a_run_builds_it_by_name_and_a_plan_has_its_parameters(tmp_path: Path) -> None:
    config = run_config("teacher", model=run(tmp_path, sam_memory="every").model_dump())
    model = build_model(config, VOCABULARY, SEG)
    batch = clips()
    build_stage(config, model).loss(build_stage(config, model).prepare(batch)).total.backward()
    assert model.get_parameter("segmenter.sam.mask_decoder.mask_tokens.weight").grad.any()
    planned = build_meta_model(config, seg_token_id=SEG)
    trained = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (model, planned)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("wrong", [{"sam_memory": "every"}, {"sam_prompt": "behind_no_point"}, {"sam_gate": True}])
def test_sam_refuses_what_sam_2_alone_reads(wrong: dict) -> None:
    with pytest.raises(ValueError, match="SAM reads none of these"):
        run_config("teacher", model={"base": str(BASE), **wrong})


def test_frames_are_stretched_and_normalised_as_by_the_library_processor() -> None:
    """To one grey level, by which the two resizers differ."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 45, 71, 3), np.uint8)
    processor = AuroraProcessor(StubTokenizer(), 98, SIDE, segmenter="sam2")
    pixels, inside = processor.sam_pixels(frames)
    theirs = Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})
    wanted = theirs([Image.fromarray(f) for f in frames], return_tensors="pt").pixel_values
    assert inside == (SIDE, SIDE) and pixels.shape == wanted.shape
    assert (pixels - wanted).abs().max() < 1.01 / 255 / 0.224


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True], ids=["light", "merged"])
def test_an_export_comes_back(merge: bool, tmp_path: Path) -> None:
    trainable = TRAINED.model_copy(update={"full": MEMORY})
    model_section = run(tmp_path, sam_memory="every").model_dump()
    config = run_config("teacher", model=model_section, trainable=trainable.model_dump())
    model, batch = build_model(config, VOCABULARY, SEG), clips()
    stir(model, 7)
    save_pretrained(model.eval(), tmp_path / "out", merge=merge)
    back = from_pretrained(tmp_path / "out")
    assert back.segmenter.memory == "every"
    found = [m(m.pack(batch, batch.answers), m.encode(batch)).mask_logits for m in (model, back)]
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)
    if merge:
        names = {file.name for file in (tmp_path / "out" / "sam2").iterdir()}
        assert names == {"config.json", "model.safetensors"}


def test_an_evaluation_names_the_files_of_the_folder(tmp_path: Path) -> None:
    """They have the names of the base's, whose own must stay."""
    (tmp_path / "data").mkdir()
    (tmp_path / "trained.json").write_text("{}")
    section = run(tmp_path).model_dump()
    config = run_config("teacher", model=section, data={"answer": "class", "root": str(tmp_path / "data")})
    files = evaluation_facts(config, "teacher", tmp_path)["files"]
    assert {"config.json", "sam2/config.json", "sam2/model.safetensors"} <= files.keys()
    assert files["config.json"] != files["sam2/config.json"]


def test_the_check_of_weights_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_sam2(tmp_path)
    assert check_weights.main(["--sam", str(folder)]) == 0
    assert re.search(r"memory_attention +\d+ +0 +0 ", capsys.readouterr().out)
    state = load_file(folder / "model.safetensors")
    state["no_object_pointer"] = torch.full((1, 3), torch.nan)
    save_file(state, folder / "model.safetensors")
    assert check_weights.main(["--sam", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "no_object_pointer: (1, 3), expected (1, 128)" in printed and "no_object_pointer holds NaN" in printed


def test_the_plan_counts_what_a_frame_saves() -> None:
    """Of the released large model, frozen and trained, without and with memory; in a process of its own, since which
    kernels a meta device stands for has depended on what ran before."""
    command = [sys.executable, "-m", "tests.sam2_cases"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for memory, trained, counted in json.loads(done.stdout.splitlines()[-1]):
        planned = (SAM2_TRAINED if trained else SAM2_FROZEN) + SAM2_MEMORY * (memory != "none")
        assert counted == pytest.approx(planned, rel=0.05), (memory, trained)


def test_a_run_is_planned_and_memory_costs_more() -> None:
    """With memory a query holds about 9 times as much, and yet a tenth of what a clip without recomputation would."""
    runs = [load_config(ROOT / "configs" / "sam2" / "grpo.yaml", [f"model.sam_memory={m}"]) for m in ("none", "every")]
    assert all(make_plan(run, Machine(2, 48_000_000_000)).fits for run in runs)
    none, every = (decoder_saves(meta_model(run.model_dump_json()), 10) for run in runs)
    assert 5 * none < every < 10 * (SAM2_TRAINED + SAM2_MEMORY) * 256 * 64**2 / 9
