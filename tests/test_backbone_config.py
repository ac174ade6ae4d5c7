"""The released config.json: what is read of it, both spellings of the rotary base, and every fault at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model.backbones.videollama2.config import LanguageConfig, VideoLlama2Config
from model.backbones.videollama2.weights import load_backbone


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with config.json only."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    return tmp_path


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
