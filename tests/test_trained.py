"""Light checkpoints of the joint model, and its builder: which weights a stage starts from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import TrainableConfig
from model.aurora.build import build_model
from model.aurora.trained import (
    find_trained,
    load_mask_decoder,
    load_trained,
    read_trained,
    save_trained,
    trained_names,
)
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

ROWS_AND_WHOLE = LORA.model_copy(update={"full": (r"mm_projector_a\.", r"layers\.0\.self_attn\.q_proj\.bias")})
"""Adapters, [SEG] rows, whole parameters, one of them of a layer with an adapter."""

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
    adapters = ["adapter_config.json"] if trainable.lora_rank else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*adapters, "adapter_model.safetensors", "trained.json"]
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
    names = read_trained(tmp_path).tensors.keys()
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
    assert read_trained(tmp_path / "two").tensors.keys() == read_trained(tmp_path / "one").tensors.keys()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_trained(tiny_model(LORA), tmp_path)
    with pytest.raises(WeightsError, match="lora_rank is 2 there and 0 here") as error:
        load_trained(tiny_model(WHOLE), tmp_path)
    assert "no parameter of this model" in str(error.value) and "trained here, but not stored" in str(error.value)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("trainable", [LORA, ROWS_AND_WHOLE, WHOLE], ids=["lora", "rows", "whole"])
def test_checkpoints_of_earlier_versions_load(version: int, trainable: TrainableConfig, tmp_path: Path) -> None:
    """Written out as they were: one file under our names; exports in up to four files, plain names in three of them."""
    model, again = tiny_model(trainable, seed=0), tiny_model(trainable, seed=0)
    stir(model, 3)
    tensors = {k: p.detach().clone() for k, p in model.named_parameters() if k in trained_names(model)}
    decoder = "segmenter.sam.mask_decoder."
    if version == 1:
        files = {"trained.safetensors": tensors}
    else:
        plain = {k.replace(".base_layer.", "."): x for k, x in tensors.items() if "lora_" not in k}
        files = {
            "adapter_model.safetensors": {
                f"base_model.model.{k}".replace(".default.", "."): x for k, x in tensors.items() if "lora_" in k
            },
            "seg_head.safetensors": {k: x for k, x in plain.items() if k.startswith("text_hidden_fcs.")},
            "mask_decoder.safetensors": {k.removeprefix("segmenter.sam."): x for k, x in plain.items()
                                         if k.startswith(decoder)},
            "trained_rest.safetensors": {k: x for k, x in plain.items()
                                         if not k.startswith(("text_hidden_fcs.", decoder)) and "seg_row" not in k},
        }  # fmt: skip
        for k, x in plain.items():
            if k.endswith(".seg_row"):
                key = f"{k.removesuffix('seg_row')}token_adapter.trainable_tokens_delta"
                files["adapter_model.safetensors"][f"base_model.model.{key}"] = x[None].clone()
    files = {name: part for name, part in files.items() if part}
    for name, part in files.items():
        save_file(part, tmp_path / name)
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files}
    settings = {
        "format": version, "kind": "light", "seg_token_id": SEG, "trainable": trainable.model_dump(mode="json"),
        "sha256": digests["trained.safetensors"] if version == 1 else digests, "names": sorted(tensors),
    }  # fmt: skip
    (tmp_path / "trained.json").write_text(json.dumps(settings))
    load_trained(again, tmp_path)
    assert all(torch.equal(again.get_parameter(name), x) for name, x in tensors.items())


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    model = tiny_model(WHOLE)
    with pytest.raises(WeightsError, match="no light checkpoint"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.text_hidden_fcs.0.0.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="SHA-256"):
        load_trained(model, tmp_path)
    save_trained(model, tmp_path)
    settings = json.loads((tmp_path / "trained.json").read_text())
    for text, words in ((json.dumps(settings | {"format": 9}), "format 9"), ("{", "not the settings"),
                        ("[]", "not the settings"), ('{"format": 3}', "not the settings")):  # fmt: skip
        (tmp_path / "trained.json").write_text(text)
        with pytest.raises(WeightsError, match=words):
            load_trained(model, tmp_path)
    assert not list(tmp_path.glob(".*"))


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
