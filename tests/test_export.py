"""Exports: both kinds give the model that was saved, peft reads the adapters, the card holds the run's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import ModelConfig, RunConfig, TrainableConfig
from dataset.processor import AuroraProcessor
from dataset.prompt import load_tokenizer
from model.aurora.build import build_model
from model.aurora.export import SAM, SAM_JSON, from_pretrained, save_pretrained
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.aurora.trainable import apply_trainable
from model.aurora.trained import SETTINGS, TENSORS, load_trained, read_trained, save_trained
from model.backbones.videollama2.weights import load_backbone
from model.segmenters.sam import build_segmenter
from scripts.export import export, main
from tests.aurora_cases import BASE, LORA, SAM_SIDE, SEG, WHOLE, stir, three_clips, tiny_model, tiny_segmenter
from tests.aurora_cases import SAM as SIZES
from tests.data_builders import write_tokenizer
from utils.config import save_config
from utils.errors import DataError, NonFiniteError, WeightsError

VOCABULARY = TrainableConfig(
    lora_rank=2, lora_alpha=4.0, lora_targets=(r"language_model\..*\.[qv]_proj$", r"mask_decoder\..*\.q_proj$")
)
"""As published: adapters, embed_tokens and lm_head whole."""
ROWS_ALONE = TrainableConfig(lora_rank=0, lora_targets=(), full=(), seg_rows_only=True)
KINDS = {"lora and rows": LORA, "vocabulary": VOCABULARY, "whole": WHOLE, "rows alone": ROWS_ALONE}


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny SAM on disk and the section `model` that names it."""
    folder = tmp_path_factory.mktemp("sam")
    SIZES.to_json(folder / "sam.json")
    save_file(tiny_segmenter().sam.state_dict(), folder / "sam.safetensors")
    return ModelConfig(
        base=str(BASE),
        sam_checkpoint=str(folder / "sam.safetensors"),
        sam_type=str(folder / "sam.json"),
        sam_image_size=SAM_SIDE,
    )


def trained(kind: str, sam: ModelConfig) -> AuroraModel:
    model = tiny_model(KINDS[kind])
    stir(model, seed=3)
    model.origin = sam
    return model.eval()


@torch.no_grad()
def outputs(model: AuroraModel) -> tuple[Tensor, Tensor]:
    batch = three_clips()
    output = model.eval()(model.pack(batch, batch.answers), model.encode(batch))
    return output.answer_logits, output.mask_logits


def same(found: AuroraModel, wanted: AuroraModel, tolerance: float) -> None:
    for got, want in zip(outputs(found), outputs(wanted), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_light_and_merged_load_back_with_equal_outputs(kind: str, sam: ModelConfig, tmp_path: Path) -> None:
    model = trained(kind, sam)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    light, merged = save_pretrained(model, tmp_path / "light", merge=False), save_pretrained(model, tmp_path / "merged")
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())  # saving changed nothing
    again = from_pretrained(light)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    same(again, model, 1e-6)
    whole = from_pretrained(merged)
    assert not any(".lora_" in k or "seg_row" in k for k in whole.state_dict())
    same(whole, model, 2e-5)
    assert (light / "adapter_config.json").is_file() == (kind in ("lora and rows", "vocabulary"))


def test_merged_folder_is_a_released_folder_and_sam_a_released_sam(sam: ModelConfig, tmp_path: Path) -> None:
    model = trained("lora and rows", sam)
    folder = save_pretrained(model, tmp_path)
    shutil.move(folder, tmp_path.with_name("moved"))  # paths inside are relative
    folder = tmp_path.with_name("moved")
    backbone, report = load_backbone(folder)
    assert not report.ignored and not report.zero_filled
    segmenter = build_segmenter(str(folder / SAM_JSON), SAM_SIDE, folder / SAM)
    plain = AuroraModel(backbone, segmenter, SEG)
    apply_trainable(plain, read_trained(folder).trainable)
    load_trained(plain, folder)
    same(plain, model, 2e-5)
    row = backbone.language_model.lm_head.weight[SEG]
    assert torch.equal(row, model.backbone.language_model.lm_head.seg_row)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("kind", ["lora and rows", "vocabulary"])
def test_peft_itself_reads_the_adapters(kind: str, sam: ModelConfig, tmp_path: Path) -> None:
    """On a plain joint model: adapters, [SEG] rows, vocabulary, head and decoder."""
    model = trained(kind, sam)
    folder = save_pretrained(model, tmp_path, merge=False)
    adapted = PeftModel.from_pretrained(tiny_model().eval(), str(folder))
    assert adapted.peft_config["default"].r == 2
    same(adapted.base_model.model, model, 1e-6)


def test_bf16_exports_stay_near_each_other(sam: ModelConfig, tmp_path: Path) -> None:
    """Merged weights are rounded once more: mean deviation of the logits under 2 % of their root mean square."""
    model = trained("lora and rows", sam).to(torch.bfloat16)
    light, merged = save_pretrained(model, tmp_path / "light", merge=False), save_pretrained(model, tmp_path / "merged")
    first, second = (outputs(from_pretrained(folder))[0].float() for folder in (light, merged))
    assert from_pretrained(merged).backbone.dtype == torch.bfloat16
    assert (first - second).abs().mean() < 0.02 * first.square().mean().sqrt()


def test_a_light_export_is_a_light_checkpoint(sam: ModelConfig, tmp_path: Path) -> None:
    model = trained("vocabulary", sam)
    save_trained(model, tmp_path / "run" / "final")
    light = save_pretrained(model, tmp_path / "light", merge=False)
    assert (light / TENSORS).read_bytes() == (tmp_path / "run" / "final" / TENSORS).read_bytes()
    same(from_pretrained(tmp_path / "run"), model, 1e-6)


def test_faults_are_named(sam: ModelConfig, tmp_path: Path) -> None:
    model = trained("vocabulary", sam)
    folder = save_pretrained(model, tmp_path / "light", merge=False)
    settings = json.loads((folder / SETTINGS).read_text())
    moved = settings | {"model": settings["model"] | {"base": "/nowhere"}}
    (folder / SETTINGS).write_text(json.dumps(moved))
    with pytest.raises(WeightsError, match="base is /nowhere, which does not exist. Remedy: pass base="):
        from_pretrained(folder)
    same(from_pretrained(folder, base=BASE), model, 1e-6)
    save_file({"text_hidden_fcs.0.0.weight": torch.zeros(1)}, folder / TENSORS)
    with pytest.raises(WeightsError, match=f"{TENSORS}: missing, or not the file"):
        from_pretrained(folder, base=BASE)
    with pytest.raises(WeightsError, match="no light checkpoint"):
        from_pretrained(tmp_path / "nothing")
    model.origin = None
    save_trained(model, tmp_path / "run")
    with pytest.raises(WeightsError, match="does not say where.*Remedy: write an export .* scripts/export.py"):
        from_pretrained(tmp_path / "run")
    with pytest.raises(RuntimeError, match="the model's base is unknown"):
        save_pretrained(model, tmp_path / "none")


def test_float16_that_overflows_is_told_to_use_bf16(sam: ModelConfig, tmp_path: Path) -> None:
    """The "!!!!" of the published loader's users: NaN logits, whose argmax is token 0."""
    model = trained("rows alone", sam)
    with torch.no_grad():
        model.backbone.language_model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
    folder = save_pretrained(model, tmp_path)
    model = from_pretrained(folder, dtype=torch.float16)
    batch = three_clips()
    with pytest.raises(NonFiniteError, match="type float16.*overflow in float16. Remedy: load the weights in bf16"):
        predict(model, batch, _Words(), max_new_tokens=2)
    with pytest.raises(NonFiniteError, match="bf16"):
        outputs(model)
    assert all(x.isfinite().all() for x in outputs(from_pretrained(folder, dtype=torch.bfloat16)))


class _Words:
    """A tokenizer that is asked for the stop token alone."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return 1

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


@pytest.fixture
def run(sam: ModelConfig, tmp_path: Path) -> tuple[Path, RunConfig]:
    """A finished run of the tiny model with its own base, which has a tokenizer; and its configuration."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.npz", "lisa_head"))
    write_tokenizer(base)
    tokenizer, seg_id = load_tokenizer(base)
    config = RunConfig.model_validate(
        {
            "stage": "teacher",
            "model": sam.model_dump() | {"base": str(base), "system_prompt": "none"},
            "trainable": LORA.model_dump(),
            "data": {"answer": "class", "audio_padding_seconds": None},
            "engine": {"precision": "fp32"},
        }
    )
    model = build_model(config, len(tokenizer), seg_id)
    stir(model, seed=1)
    folder = tmp_path / "run" / "final"
    save_trained(model, folder)
    save_config(config, folder)
    return folder, config


def clip() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 40, 60, 3), dtype=np.uint8), rng.uniform(-0.3, 0.3, 16_000).astype(np.float32)


def test_export_command_writes_folders_that_answer_alike(
    run: tuple[Path, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.json"
    scores = {"n": 7, "official": {"J": 41.25, "F": 52.5, "J&F": 46.875, "n": 7}, "class_accuracy": 71.4,
              "format_share": 100.0, "faithful": None}  # fmt: skip
    facts = {"checkpoint_sha256": "a" * 64, "probe": "none", "git": "abc"}
    metrics.write_text(json.dumps({"split": "test_s", "protocols": ["official"], "scores": scores, **facts}))
    predictions = []
    for kind in ("light", "merged"):
        out = tmp_path / kind
        assert main([str(run[0].parent), str(out), "--kind", kind, "--metrics", str(metrics)]) == 0
        model, processor = from_pretrained(out), AuroraProcessor.from_pretrained(out)
        processor = AuroraProcessor.from_pretrained(out, audio_windows=None)
        batch = processor(*clip(), " The dog ")
        predictions.append(predict(model, batch, processor.tokenizer, 4)[0])
        card = (out / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert "| test_s | official | 7 | 41.25 | 52.50 | 46.88 | - | 71.40 | 100.00 | - |" in card
        first = header["model-index"][0]["results"][0]["metrics"][0]
        assert first == {"type": "J", "value": 41.25, "name": "J (official)"}
        assert "checkpoint aaaaaaaaaaaa" in card
    assert "merged export in" in capsys.readouterr().out
    assert predictions[0].text == predictions[1].text and predictions[0].mask_logits.shape == (2, 40, 60)
    torch.testing.assert_close(predictions[0].mask_logits, predictions[1].mask_logits, atol=1e-4, rtol=1e-4)


def test_evaluation_reads_both_exports(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    """build_model with eval.checkpoint: the run, its light export, its merged export as base and checkpoint."""
    models = []
    for kind in ("light", "merged"):
        export(run[0], tmp_path / kind, kind)
        settings = yaml.safe_load((tmp_path / kind / "config.yaml").read_text())
        section = settings["model"] | {"attention": "sdpa"}
        evaluation = {"stage": "eval", "model": section, "eval": {"checkpoint": str(tmp_path / kind)}}
        config = RunConfig.model_validate(evaluation | {"engine": {"precision": "fp32"}})
        tokenizer, seg_id = load_tokenizer(config.model.base)
        models.append(build_model(config, len(tokenizer), seg_id))
        assert "Not evaluated" in (tmp_path / kind / "README.md").read_text()
    same(models[1], models[0], 2e-5)


def test_export_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no config.yaml" in capsys.readouterr().err


def test_processor_round_trip_and_calls(tmp_path: Path) -> None:
    tokenizer, seg_id = load_tokenizer(write_tokenizer(tmp_path / "base"))
    options = {"audio_padding_seconds": None, "frame_resize": "pad", "system_prompt": "qwen2"}
    processor = AuroraProcessor(tokenizer, 98, 32, **options)
    processor.save_pretrained(tmp_path / "out")
    again = AuroraProcessor.from_pretrained(tmp_path / "out")
    assert again.tokenizer.convert_tokens_to_ids("[SEG]") == seg_id and len(again.tokenizer) == len(tokenizer)
    frames, sound = clip()
    one, two = processor(frames, sound, "The dog"), again([frames] * 2, [sound] * 2, ["The dog", "The cat"])
    assert len(two) == 2 and torch.equal(one.pixel_values[0], two.pixel_values[1])
    assert torch.equal(one.prompts[0], two.prompts[0]) and one.mask_sizes == [(40, 60)]
    assert one.samples[0].video_key != two.samples[0].video_key
    with pytest.raises(ValueError, match="counts differ"):
        processor([frames], [sound, sound], ["a", "b"])
    with pytest.raises(DataError, match="unknown settings \\['size'\\]"):
        AuroraProcessor.from_pretrained(tmp_path / "out", size=3)
    with pytest.raises(DataError, match="preprocessor_config.json: not readable"):
        AuroraProcessor.from_pretrained(tmp_path / "base")


def test_a_card_needs_metrics_of_an_evaluation(
    run: tuple[Path, RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "metrics.json"
    wrong.write_text("{}")
    assert main([str(run[0]), str(tmp_path / "out"), "--metrics", str(wrong)]) == 1
    assert "no metrics of an evaluation" in capsys.readouterr().err and not (tmp_path / "out").exists()
