"""scripts/check_weights.py: what fits, and the message of every fault a download can have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.backbones.videollama2.weights import check_keys, load_backbone, moved_component, released_keys
from model.segmenters.sam import SAM_SIZES, SamSizes, assemble_sam, build_segmenter, recognise
from scripts.check_weights import main
from tests.conftest import TINY
from tests.data_builders import write_tokenizer
from tests.test_weights import Bomb
from tests.tiny_run import ROOT, environment
from utils.errors import WeightsError
from utils.tensor_files import TensorFileError

TOWER = "model.vision_tower.vision_tower.vision_model."
SMALL_SAM = SamSizes(24, 2, 2, (1,), patch_size=8, window_size=2, prompt_width=32, decoder_mlp=32, iou_head_width=32)


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return load_file(TINY / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, stored: dict[str, Tensor]) -> Path:
    """A complete checkpoint folder with a tokenizer."""
    write_tokenizer(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sam(tmp_path: Path) -> tuple[Path, Path]:
    """(weights at 64 pixels, JSON of sizes) of a small SAM."""
    torch.manual_seed(0)
    SMALL_SAM.to_json(tmp_path / "sam.json")
    torch.save(assemble_sam(SMALL_SAM, 64).state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth", tmp_path / "sam.json"


def test_the_7b_model_on_meta(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--meta"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^all +1156 +0 +0 +0 +0 +8,527,095,391$", text, re.MULTILINE)
    assert re.search(r"^vision tower +448 .* 428,225,600$", text, re.MULTILINE)
    assert "everything fits" in text


def test_the_7b_model_on_meta_takes_seconds_and_little_memory() -> None:
    """A process of its own: under 60 s of processor time and 4 GB, whatever else the machine does."""
    command = [sys.executable, "scripts/check_weights.py", "--meta"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 60
    assert used.ru_maxrss * 1024 < 4e9


def test_a_whole_folder_and_sam_fit(folder: Path, sam: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(folder), "--sam", str(sam[0]), "--sam-type", str(sam[1]), "--sam-image-size", "32"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^all +{len(load_file(folder / 'model.safetensors'))} +0 +0 +0 +0 ", text, re.MULTILINE), text
    assert "stored types: float32" in text
    assert re.search(r"tokenizer: (\d+) tokens with \[SEG\] = \d+; the matrices have 600 rows", text)
    assert "3 position tables are resampled: grid (8, 8) -> (4, 4), bicubic" in text
    assert main([*arguments, "--meta"]) == 0
    assert "stored types" not in capsys.readouterr().out


def test_tolerated_keys_are_explained(
    folder: Path, stored: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    del stored["model.audio_tower.predictor.bias"]
    del stored["model.audio_tower.encoder.layers.1.self_attn.relative_attention_bias.weight"]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(stored, folder / "model.safetensors")
    assert main(["--model", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "predictor.bias (527,) (no forward reads it; zeros take its place)" in text
    assert "relative_attention_bias.weight (320, 4) (copy of the one position table, read from layer 0)" in text
    assert "inv_freq (8,) (a constant that is recomputed; ignored)" in text
    load_backbone(folder)


def test_vision_tower_under_another_prefix(
    folder: Path, stored: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """As transformers 5 names it: a loose load would leave the tower random."""
    moved = {k.replace(TOWER, "model.vision_tower.vision_tower."): x for k, x in stored.items()}
    save_file(moved, folder / "model.safetensors")
    words = re.escape(f"the vision tower is stored under 'model.vision_tower.vision_tower.' instead of '{TOWER}'")
    with pytest.raises(TensorFileError, match=f"{words}.*rename these keys"):
        load_backbone(folder)
    assert main(["--model", str(folder)]) == 1
    assert re.search(f"PROBLEM {words}", capsys.readouterr().out)


def test_everything_under_another_prefix_is_recognised() -> None:
    expected = released_keys()
    hints = moved_component(check_keys({f"base_model.model.{k}": s for k, s in expected.items()}, expected))
    assert len(hints) == 6 and "under 'base_model.model.model.mm_projector_a.'" in " ".join(hints)


@pytest.mark.parametrize("fault", ["truncated", "nan", "tokenizer", "rows", "code"])
def test_faults_are_named_and_the_status_is_1(
    fault: str, folder: Path, stored: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        words = "model.safetensors: damaged or truncated.*download it again"
    elif fault == "nan":
        save_file(stored | {"model.norm.weight": torch.full((64,), torch.inf)}, weights)
        words = "model.norm.weight holds NaN or infinity"
    elif fault == "tokenizer":
        text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_end|>", "</s>")
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        words = r"<\|im_end\|> is no single token; .*use the tokenizer shipped with the base model"
    elif fault == "rows":
        write_tokenizer(folder, extra_tokens=[f"<{i}>" for i in range(300)])
        words = r"no spare row for \[SEG\]: 600 rows, 6\d\d tokens"
    else:
        weights.unlink()
        torch.save({"lm_head.weight": Bomb(folder / "ran")}, folder / "pytorch_model.bin")
        words = "pytorch_model.bin: refused, .*could run code"
    assert main(["--model", str(folder)]) == 1
    assert re.search(f"{words}", capsys.readouterr().out, re.DOTALL)
    assert not (folder / "ran").exists()


def test_sam_of_another_size_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names what the file is; ViT-B has the fewest weights to write."""
    file = tmp_path / "sam.safetensors"
    save_file(assemble_sam(SAM_SIZES["vit_b"], 32).state_dict(), file)
    assert recognise(load_file(file)) == "vit_b"
    assert main(["--sam", str(file), "--sam-image-size", "32"]) == 0
    assert main(["--sam", str(file), "--sam-type", "vit_l", "--meta"]) == 1
    assert "keys do not fit vit_l; the file holds vit_b" in capsys.readouterr().out
    SMALL_SAM.to_json(tmp_path / "sam.json")
    with pytest.raises(WeightsError, match="the file holds vit_b, .*Remedy: set model.sam_type: vit_b"):
        build_segmenter(str(tmp_path / "sam.json"), 32, file)


def test_sam_with_code_or_cut_short_is_refused(sam: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    file, mark = sam[0], sam[0].with_name("ran")
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    assert main(["--sam", str(file)]) == 1
    assert "sam.pth: truncated torch file" in capsys.readouterr().out
    torch.save({"image_encoder.pos_embed": Bomb(mark)}, file)
    assert main(["--sam", str(file)]) == 1
    assert re.search("sam.pth: refused, .*could run code.*Remedy", capsys.readouterr().out)
    assert not mark.exists()


def test_something_must_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "give --model, --sam or --meta" in capsys.readouterr().err
