"""Loading and saving: released names both ways, every fault named, nothing held twice; the released config.json."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.backbones.videollama2.config import LanguageConfig, VideoLlama2Config
from model.backbones.videollama2.weights import (
    RELEASED_TABLE,
    TABLE,
    expected_keys,
    from_released,
    load_backbone,
    released_keys,
    save_backbone,
    to_released,
)
from utils import tensor_files
from utils.tensor_files import TensorFileError, save_safetensors


@pytest.fixture
def stored(tiny_folder: Path) -> dict[str, Tensor]:
    return load_file(tiny_folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with config.json only."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    return tmp_path


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: dict[str, Tensor], suffix: str = "safetensors") -> list[Path]:
    """Three shards with an index."""
    stem, names = ("model" if suffix == "safetensors" else "pytorch_model"), sorted(tensors)
    files = [folder / f"{stem}-{i + 1:05d}-of-00003.{suffix}" for i in range(3)]
    weight_map = {}
    for i, file in enumerate(files):
        part = {name: tensors[name] for name in names[i::3]}
        weight_map |= dict.fromkeys(part, file.name)
        if suffix == "safetensors":
            save_file(part, file)
        else:
            torch.save(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def same(folder: Path, stored: dict[str, Tensor]) -> None:
    """The folder loads to exactly the stored values."""
    state = load_backbone(folder)[0].state_dict()
    assert all(torch.equal(state[from_released(name)], tensor) for name, tensor in stored.items())


def test_released_size_has_the_released_keys() -> None:
    """1156 names and shapes of the 7B model, on the meta device."""
    keys = expected_keys(VideoLlama2Config(LanguageConfig(3584, 18944, 28, 28, 4, 152064)))
    assert keys == released_keys()
    assert len(keys) == 1156
    assert sum(math.prod(shape) for shape in keys.values()) == 8_527_095_391


def test_names_map_both_ways(stored: dict[str, Tensor]) -> None:
    for name in stored:
        assert name in to_released(from_released(name), 2)
    assert to_released(TABLE, 2) == [RELEASED_TABLE.format(i) for i in range(2)]
    assert from_released("model.visual_model.mask") == "language_model.model.visual_model.mask"
    with pytest.raises(ValueError, match="merge or remove adapters"):
        to_released("text_hidden_fcs.0.weight", 2)


def test_round_trip_is_exact(tmp_path: Path, tiny_folder: Path, stored: dict[str, Tensor]) -> None:
    model, report = load_backbone(tiny_folder)
    assert report.files == ("model.safetensors",)
    assert not report.ignored and not report.zero_filled
    assert report.parameters == sum(t.numel() for t in stored.values()) - stored[RELEASED_TABLE.format(1)].numel()
    assert not model.training
    written = save_backbone(model, tmp_path)
    assert [path.name for path in written] == ["model.safetensors", "config.json"]
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert VideoLlama2Config.from_folder(tmp_path) == model.config
    assert not list(tmp_path.glob(".*"))


def test_sharded_save_and_stale_files(tmp_path: Path, tiny_folder: Path, stored: dict[str, Tensor]) -> None:
    model, _ = load_backbone(tiny_folder)
    (tmp_path / "model-of-another-kind.safetensors").write_bytes(b"kept")
    save_backbone(model, tmp_path)
    save_backbone(model, tmp_path, max_shard_bytes=500_000)
    shards = sorted(tmp_path.glob("model-0*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert all(path.stat().st_size < 520_000 for path in shards)
    same(tmp_path, stored)
    save_backbone(model, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model-of-another-kind.safetensors", "model.safetensors"
    ]  # fmt: skip
    same(tmp_path, stored)


def test_failed_save_leaves_the_old_file(
    tmp_path: Path, tiny_folder: Path, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_backbone(tiny_folder)
    save_backbone(model, tmp_path)

    def full_disk(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_backbone(model, tmp_path)
    same(tmp_path, stored)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_what_the_user_lets_them_read(tmp_path: Path, mask: int) -> None:
    """Like any new file of this user, and whatever an earlier file of that name allowed."""
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        for _ in range(2):
            save_safetensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
            assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
            (tmp_path / "x.safetensors").chmod(0o400)
    finally:
        os.umask(before)
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["safetensors", "bin", "one bin", "legacy bin"])
def test_other_file_layouts(folder: Path, stored: dict[str, Tensor], kind: str) -> None:
    if kind in ("safetensors", "bin"):
        write_sharded(folder, stored, kind)
    else:
        torch.save(stored, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "one bin")
    same(folder, stored)


def test_all_faults_are_listed_at_once(folder: Path, stored: dict[str, Tensor]) -> None:
    del stored["model.layers.1.mlp.up_proj.weight"], stored["model.mm_projector.readout.0.bias"]
    stored["model.visual_model.mask"] = torch.zeros(3)
    stored["lm_head.weight"] = torch.zeros(5, 64)
    with pytest.raises(TensorFileError) as error:
        load_backbone(write(folder, stored))
    text = str(error.value)
    assert "4 keys do not fit" in text
    assert "missing: model.layers.1.mlp.up_proj.weight (128, 64)" in text
    assert "missing: model.mm_projector.readout.0.bias (64,)" in text
    assert "unexpected: model.visual_model.mask (3,)" in text
    assert "shape: lm_head.weight is (5, 64), the config asks for (600, 64)" in text


def test_position_table_stored_once_or_everywhere(folder: Path, stored: dict[str, Tensor]) -> None:
    copy = RELEASED_TABLE.format(1)
    original = dict(stored)
    del stored[copy]
    same(write(folder, stored), original)
    stored[copy] = original[copy] + 1
    with pytest.raises(TensorFileError, match="must be shared"):
        load_backbone(write(folder, stored))
    stored[RELEASED_TABLE.format(2)] = stored.pop(copy)
    with pytest.raises(TensorFileError, match="unexpected: .*layers.2.self_attn.relative"):
        load_backbone(write(folder, stored))


def test_tolerated_keys_are_reported(folder: Path, stored: dict[str, Tensor]) -> None:
    unused = [name for name in stored if ".head." in name or "predictor" in name or "post_layernorm" in name]
    assert len(unused) == 15
    for name in unused:
        del stored[name]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    model, report = load_backbone(write(folder, stored), dtype=torch.bfloat16)
    assert sorted(report.zero_filled) == sorted(unused)
    assert report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.audio_tower.predictor.weight.any()


def test_missing_shard_is_named(folder: Path, stored: dict[str, Tensor]) -> None:
    write_sharded(folder, stored)[1].unlink()
    words = r"(?s)model-00002-of-00003.safetensors: shard missing \(1 of 3.*Remedy: download the missing shards"
    with pytest.raises(TensorFileError, match=words):
        load_backbone(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_shard_is_named(folder: Path, stored: dict[str, Tensor], suffix: str) -> None:
    shard = write_sharded(folder, stored, suffix)[2]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(TensorFileError, match=f"{shard.name}.*truncated.*Remedy: download it again"):
        load_backbone(folder)


def test_damaged_legacy_file_is_named(folder: Path, stored: dict[str, Tensor]) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(stored, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    noise = random.Random(0).randbytes
    for broken in (whole[:-1000], whole[:300], b"\x00" * 5000, b"", *(noise(n) for n in range(20, 200, 5))):
        file.write_bytes(broken)
        with pytest.raises(TensorFileError, match="pytorch_model.bin"):
            load_backbone(folder)


class Bomb:
    """Pickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape = (0,)  # DeepSpeed's file holds shapes beside the tensors

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused(folder: Path, zipped: bool) -> None:
    mark = folder / "ran"
    torch.save({"lm_head.weight": Bomb(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TensorFileError, match="pytorch_model.bin: refused"):
        load_backbone(folder)
    assert not mark.exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(TensorFileError, match="pytorch_model.bin"):
        load_backbone(folder)
    assert not mark.exists()


def test_index_that_lies_is_refused(folder: Path, stored: dict[str, Tensor]) -> None:
    write_sharded(folder, stored)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.bias"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(TensorFileError, match="lacks tensor 'model.norm.bias'"):
        load_backbone(folder)
    for text, message in (('{"weight_map": {"a": "../b.safetensors"}}', "same folder"), ("[1]", "weight_map"),
                          ('{"weight_map": {}}', "same folder"), ("{", "weight_map")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(TensorFileError, match=message):
            load_backbone(folder)


def test_tensor_in_two_shards_is_refused(folder: Path, stored: dict[str, Tensor]) -> None:
    first, _, last = write_sharded(folder, stored)
    name = next(iter(load_file(first)))
    save_file(load_file(last) | {name: stored[name]}, last)
    with pytest.raises(TensorFileError, match="another shard holds as well"):
        load_backbone(folder)


def test_no_weights_and_not_a_state_dict(folder: Path) -> None:
    with pytest.raises(TensorFileError, match="no weights"):
        load_backbone(folder)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(TensorFileError, match="not a state dict"):
        load_backbone(folder)


def test_adapters_must_be_merged_before_saving(tmp_path: Path, tiny_folder: Path) -> None:
    model, _ = load_backbone(tiny_folder)
    model.mm_projector.readout[0] = nn.Sequential(model.mm_projector.readout[0])
    with pytest.raises(TensorFileError, match="missing: model.mm_projector.readout.0.weight"):
        save_backbone(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rotary_frequencies_stay_float32(tiny_folder: Path) -> None:
    exact = 1 / 1e6 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    model, _ = load_backbone(tiny_folder)
    for cast in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().float()):
        cast(model)
        positions = torch.tensor([[0, 1, 2047]])
        cosines, sines = model.language_model.model.rotary_emb(torch.zeros(1, 3, 16, dtype=model.dtype), positions)
        phases = (positions[..., None] * exact).repeat(1, 1, 2)
        assert cosines.dtype == model.dtype
        assert torch.equal(cosines, phases.cos().to(model.dtype)) and torch.equal(sines, phases.sin().to(model.dtype))
    assert model.vision_tower.siglip.embeddings.position_ids.tolist() == [list(range(49))]


def test_nothing_is_left_on_meta(tiny_folder: Path) -> None:
    model, _ = load_backbone(tiny_folder)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_training_in_place_leaves_the_file_alone(folder: Path, stored: dict[str, Tensor], layout: str) -> None:
    """Files are memory-mapped; an optimiser step must not write through."""
    files = write_sharded(folder, stored, layout)
    before = [file.read_bytes() for file in files]
    model, _ = load_backbone(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert [file.read_bytes() for file in files] == before


def test_config_round_trip_and_rope_spellings(tiny_folder: Path) -> None:
    data = json.loads((tiny_folder / "config.json").read_text())
    config = VideoLlama2Config.from_dict(data)
    assert VideoLlama2Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["num_frames"] == 10
    del data["rope_theta"]
    data["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert VideoLlama2Config.from_dict(data).language.rope_theta == 5e5
    for block in ("fixture_vision_config", "fixture_beats_config", "mm_hidden_size", "mm_hidden_size_a"):
        del data[block]
    released = VideoLlama2Config.from_dict(data)
    assert (released.vision.hidden_size, released.vision.grid, released.beats.encoder_layers) == (1152, 27, 12)
    assert not {"vision_config", "beats_config"} & released.to_dict().keys()


def test_config_faults_are_listed_at_once(folder: Path) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    del data["vocab_size"]
    data |= {"mm_projector_type": "stc_connector", "hidden_size": "64", "mm_vision_tower": "clip", "mm_hidden_size": 99}
    data["fixture_beats_config"] |= {"deep_norm": False, "widht": 3}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        load_backbone(folder)
    for part in (str(path), "vocab_size: missing",
                 "mm_projector_type = 'stc_connector': input should be 'stc_connector_v35'",
                 "hidden_size = '64': input should be a valid integer", "mm_vision_tower = 'clip'", "Remedy: ",
                 "beats_config.deep_norm = False", "beats_config.widht: unknown", "mm_hidden_size = 99"):  # fmt: skip
        assert part in str(error.value)
    for text, message in (("{", "not a valid configuration"), ("[]", "must be an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_backbone(folder)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone(folder)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="(?s)hidden_size = 65 .*num_attention_heads = 4 .*num_key_value_heads = 3"):
        VideoLlama2Config(LanguageConfig(65, 8, 1, 4, 3, 10))
    with pytest.raises(ValueError, match="mm_vision_select_layer = -40"):
        VideoLlama2Config(LanguageConfig(64, 8, 1, 4, 2, 10), select_layer=-40)
