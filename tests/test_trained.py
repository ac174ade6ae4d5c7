"""Light checkpoints of the joint model, and its builder: which weights a stage starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import TrainableConfig
from model.aurora.build import build_model
from model.aurora.trained import find_trained, load_mask_decoder, load_trained, save_trained
from tests.aurora_cases import (
    BASE,
    LORA,
    SAM,
    SAM_SIDE,
    SEG,
    VOCABULARY,
    WHOLE,
    run_config,
    stir,
    three_clips,
    tiny_model,
    tiny_segmenter,
)
from utils.errors import ConfigError, WeightsError

# ---- light checkpoints


@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_light_checkpoint_restores_the_model(trainable: TrainableConfig, tmp_path: Path) -> None:
    first, second = tiny_model(trainable, seed=0).eval(), tiny_model(trainable, seed=1).eval()
    for frozen in ("image_encoder", "prompt_encoder"):  # belong to the base, which the two share
        second.segmenter.sam.get_submodule(frozen).load_state_dict(
            first.segmenter.sam.get_submodule(frozen).state_dict()
        )
    second.segmenter.load_state_dict(second.segmenter.state_dict())  # renews the positional encoding
    stir(first, 7)
    save_trained(first, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained.json", "trained.safetensors"]
    load_trained(second, tmp_path)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), parameter, atol=0, rtol=0)
    batch = three_clips()
    with torch.no_grad():
        outputs = [m(m.pack(batch, batch.answers), m.encode(batch)) for m in (first, second)]
    torch.testing.assert_close(outputs[0].mask_logits, outputs[1].mask_logits, atol=0, rtol=0)


def test_light_checkpoint_holds_what_differs_from_the_base(tmp_path: Path) -> None:
    model = tiny_model(LORA.model_copy(update={"mask_decoder": False, "seg_head": False}))
    save_trained(model, tmp_path)
    names = set(load_file(tmp_path / "trained.safetensors"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= names
    assert {
        n for n, _ in model.named_parameters() if n.startswith(("text_hidden_fcs", "segmenter.sam.mask_d"))
    } <= names
    assert not any(n.endswith("embed_tokens.weight") or "image_encoder" in n for n in names)


def test_what_an_earlier_stage_trained_is_kept(tmp_path: Path) -> None:
    """Stage 2 trains less than stage 1: its checkpoint must still hold what stage 1 changed."""
    first = tiny_model(WHOLE)
    stir(first, 2)
    save_trained(first, tmp_path / "one")
    second = tiny_model(WHOLE.model_copy(update={"full": (r"language_model\.lm_head\.",)}))
    load_trained(second, tmp_path / "one")
    save_trained(second, tmp_path / "two")
    assert (
        load_file(tmp_path / "two" / "trained.safetensors").keys()
        == load_file(tmp_path / "one" / "trained.safetensors").keys()
    )


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_trained(tiny_model(LORA), tmp_path)
    with pytest.raises(WeightsError, match="lora_rank is 2 there and 0 here") as error:
        load_trained(tiny_model(WHOLE), tmp_path)
    assert "no parameter of this model" in str(error.value) and "trained here, but not stored" in str(error.value)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    model = tiny_model(WHOLE)
    with pytest.raises(WeightsError, match="no light checkpoint"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    tensors = load_file(tmp_path / "trained.safetensors")
    tensors.pop("text_hidden_fcs.0.0.weight")
    save_file(tensors, tmp_path / "trained.safetensors")
    with pytest.raises(WeightsError, match="SHA-256"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    settings = json.loads((tmp_path / "trained.json").read_text())
    (tmp_path / "trained.json").write_text(json.dumps(settings | {"format": 9}))
    with pytest.raises(WeightsError, match="format 9"):
        load_trained(model, tmp_path)
    (tmp_path / "trained.json").write_text("{")
    with pytest.raises(WeightsError, match="not the settings"):
        load_trained(model, tmp_path)
    assert not (tmp_path / "trained.safetensors.part").exists()


def test_run_folders_are_searched(tmp_path: Path) -> None:
    def touch(folder: str) -> Path:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "trained.json").write_text("{}")
        return tmp_path / folder

    touch("checkpoints/step_9")
    latest = touch("checkpoints/step_10")
    assert find_trained(tmp_path) == latest and find_trained(latest) == latest
    final = touch("final")
    assert find_trained(tmp_path) == final


def test_mask_decoder_alone_is_taken(tmp_path: Path) -> None:
    teacher, student = tiny_model(LORA, seed=0), tiny_model(LORA, seed=1)
    stir(teacher, 5)
    save_trained(teacher, tmp_path)
    head = student.text_hidden_fcs[0][0].weight.detach().clone()
    load_mask_decoder(student, tmp_path)
    for name, parameter in teacher.segmenter.sam.mask_decoder.named_parameters():
        torch.testing.assert_close(student.segmenter.sam.mask_decoder.get_parameter(name), parameter, atol=0, rtol=0)
    assert torch.equal(student.text_hidden_fcs[0][0].weight, head)
    with pytest.raises(WeightsError, match="lora_targets"):
        load_mask_decoder(tiny_model(WHOLE), tmp_path)


# ---- builder


@pytest.fixture(scope="module")
def sam_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("sam")
    SAM.to_json(folder / "sam.json")
    save_file(tiny_segmenter().sam.state_dict(), folder / "sam.safetensors")
    return {
        "base": str(BASE),
        "sam_type": str(folder / "sam.json"),
        "sam_checkpoint": str(folder / "sam.safetensors"),
        "sam_image_size": SAM_SIDE,
    }


def test_stages_start_from_each_other(sam_files: dict[str, object], tmp_path: Path) -> None:
    """Teacher, then a student that starts from it, then the student evaluated with its stored settings."""
    teacher = build_model(run_config("teacher", model=sam_files), VOCABULARY, SEG)
    assert teacher.training and not teacher.backbone.vision_tower.training
    stir(teacher, 1)
    save_trained(teacher, tmp_path / "teacher")

    student = build_model(
        run_config("sft", model=sam_files, sft={"teacher_checkpoint": str(tmp_path / "teacher")}), VOCABULARY, SEG
    )
    assert student.is_frozen("segmenter.sam.mask_decoder")
    name = "mask_decoder.mask_tokens.weight"
    torch.testing.assert_close(student.segmenter.sam.get_parameter(name), teacher.segmenter.sam.get_parameter(name))
    stir(student, 2)
    save_trained(student, tmp_path / "sft" / "final")

    evaluated = build_model(
        run_config("eval", model=sam_files, trainable=LORA.model_dump(), eval={"checkpoint": str(tmp_path / "sft")}),
        VOCABULARY,
        SEG,
    )
    assert not evaluated.training and not any(p.requires_grad for p in evaluated.parameters())
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(evaluated.get_parameter(key), parameter, atol=0, rtol=0)


@pytest.mark.parametrize("trainable", [LORA, WHOLE], ids=["lora", "whole"])
def test_the_student_s_start_is_chosen(
    trainable: TrainableConfig, sam_files: dict[str, object], tmp_path: Path
) -> None:
    """By default every weight of the teacher; from the base, its mask decoder alone; either way that stays frozen."""
    teacher = build_model(run_config("teacher", model=sam_files, trainable=trainable.model_dump()), VOCABULARY, SEG)
    stir(teacher, 1)
    save_trained(teacher, tmp_path)
    own = trainable.model_copy(update={"mask_decoder": False}).model_dump()
    students = {}
    for start in ("teacher", "init_from"):
        sft = {"teacher_checkpoint": str(tmp_path)} | ({} if start == "teacher" else {"student_start": start})
        config = run_config("sft", model=sam_files, trainable=own, sft=sft)
        assert config.sft.student_start == start
        students[start] = build_model(config, VOCABULARY, SEG)
        assert students[start].is_frozen("segmenter.sam.mask_decoder")
        assert not students[start].is_frozen("text_hidden_fcs")
    moved = 0
    for name, parameter in teacher.named_parameters():
        same = {start: torch.equal(student.get_parameter(name), parameter) for start, student in students.items()}
        assert same["teacher"], name
        assert same["init_from"] or not name.startswith("segmenter."), name
        moved += not same["init_from"]
    assert moved > 4


def test_bfloat16_model(sam_files: dict[str, object]) -> None:
    model = build_model(run_config("teacher", model=sam_files, engine={"precision": "bf16"}), VOCABULARY, SEG)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = three_clips()
    output = model(model.pack(batch, batch.answers), model.encode(batch))
    assert output.answer_logits.isfinite().all() and output.mask_logits.isfinite().all()


def test_a_vocabulary_without_a_spare_row_is_refused(sam_files: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no spare row"):
        build_model(run_config("teacher", model=sam_files), VOCABULARY + 1, VOCABULARY)
    with pytest.raises(ValueError, match="outside the tokenizer"):
        build_model(run_config("teacher", model=sam_files), SEG, SEG)
