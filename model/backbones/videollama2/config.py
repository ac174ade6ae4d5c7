"""Sizes of a VideoLLaMA2.1-AV model, read from the released `config.json` layout.

The released file holds the language model's sizes and the `mm_*` names, but neither SigLIP's sizes (they live in the
folder `mm_vision_tower` names) nor those of BEATs (constants of the released code, BEATs.py:26-62). Both may be given
in extra blocks `vision_config` and `beats_config`; without a block the released constants hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked

from utils.tensor_files import TensorFileError, read_json

CONFIG_NAME = "config.json"
VISION_BLOCKS = ("vision_config", "fixture_vision_config")
BEATS_BLOCKS = ("beats_config", "fixture_beats_config")
IGNORED = {
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
    *("vision_use_head", "hidden_size", "finetuned_model", "dropout", "dropout_input", "attention_dropout"),
    *("activation_dropout", "encoder_layerdrop", "predictor_dropout"),
}
"""Fields of the two blocks without effect on a tower, unless its class names them: bookkeeping of transformers, BEATs'
`hidden_size`, and its dropout and layerdrop: the tower is deterministic in training too (the released code drops 5 % of
the layers of a frozen tower)."""

STRICT = ConfigDict(strict=True, extra="forbid")
LENIENT = ConfigDict(strict=True, extra="ignore")
TokenId = Annotated[int | None, BeforeValidator(lambda ids: ids[0] if isinstance(ids, list) and ids else ids)]
"""Of a list of end tokens the first ends an answer."""


@checked(frozen=True, config=STRICT)
class VisionConfig:
    """SigLIP's sizes, named as in transformers; the defaults are google/siglip-so400m-patch14-384."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    """Side of the square input in pixels."""
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0

    @property
    def grid(self) -> int:
        """Patches along one side (27 as released)."""
        return self.image_size // self.patch_size


@checked(frozen=True, config=STRICT)
class BeatsConfig:
    """BEATs' sizes, named as in the released BEATs.py; the defaults are iter3+ AS2M (cpt2)."""

    input_patch_size: int = 16
    """Side of a patch: fbank frames and mel bins."""
    embed_dim: int = 512
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    encoder_attention_heads: int = 12
    conv_pos: int = 128
    """Kernel of the positional convolution in patches."""
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    """Relative distance in patches from which all positions share the last bucket."""
    layer_wise_gradient_decay_ratio: float = 0.6
    """Factor on the gradient at the entry of each layer (1 = none)."""
    predictor_class: int = 527
    """Rows of the AudioSet head, which is stored and never used."""
    mel_bins: int = 128
    fbank_mean: float = 15.41663
    fbank_std: float = 6.55582
    """Raw fbank energies enter as (fbank - mean) / (2 * std)."""
    # What follows are choices of BEATs iter3+ that the encoder is written for.
    activation_fn: Literal["gelu"] = "gelu"
    deep_norm: Literal[True] = True
    layer_norm_first: Literal[False] = False
    relative_position_embedding: Literal[True] = True
    gru_rel_pos: Literal[True] = True
    conv_bias: Literal[False] = False


@checked(frozen=True, config=LENIENT)
class LanguageConfig:
    """Qwen2's sizes, named as in transformers; fields without a default must stand in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    pad_token_id: TokenId = None


@checked(frozen=True, config=LENIENT)
class Choices:
    """What of VideoLLaMA2.1-7B-AV (scripts/custom/va_joint.sh) this package is written for."""

    mm_projector_type: Literal["stc_connector_v35"] = "stc_connector_v35"
    mm_projector_a_type: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    mm_vision_select_feature: Literal["patch"] = "patch"
    tie_word_embeddings: Literal[False] = False
    use_sliding_window: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    mm_vision_tower: Annotated[str, Field(pattern="(?i)siglip")] = "google/siglip-so400m-patch14-384"
    mm_vision_select_layer: int = -2
    rope_scaling: None = None
    rope_type: Literal["default"] = "default"


@dataclass(frozen=True)
class VideoLlama2Config:
    """Everything that fixes the shapes of a VideoLLaMA2.1-AV model.

    Raises:
        ValueError: sizes that do not go together, all at once.
    """

    language: LanguageConfig
    vision: VisionConfig = VisionConfig()
    beats: BeatsConfig = BeatsConfig()
    select_layer: int = -2
    """Index into SigLIP's hidden_states (embeddings first, then one per layer; no post_layernorm)."""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    """Fields of the file that fix no shape (num_frames, tokenizer_*, ...); written back unchanged."""

    def __post_init__(self) -> None:
        language, vision, beats = self.language, self.vision, self.beats
        problems = [
            f"{name} = {size} must be a positive multiple of {divisor_name} = {divisor}"
            for name, size, divisor_name, divisor in (
                ("hidden_size", language.hidden_size, "2 * num_attention_heads", 2 * language.num_attention_heads),
                ("num_attention_heads", language.num_attention_heads, "num_key_value_heads",
                 language.num_key_value_heads),
                ("vision_config.hidden_size", vision.hidden_size, "num_attention_heads", vision.num_attention_heads),
                ("beats_config.encoder_embed_dim", beats.encoder_embed_dim, "encoder_attention_heads",
                 beats.encoder_attention_heads),
                ("beats_config.encoder_embed_dim", beats.encoder_embed_dim, "conv_pos_groups", beats.conv_pos_groups),
                ("beats_config.num_buckets", beats.num_buckets, "4", 4),
            )
            if divisor < 1 or size < 1 or size % divisor
        ]  # fmt: skip
        if not 0 <= self.vision_layers <= vision.num_hidden_layers:
            problems.append(f"mm_vision_select_layer = {self.select_layer}: out of range for "
                            f"{vision.num_hidden_layers} layers")  # fmt: skip
        if vision.patch_size < 1 or vision.grid < 2:
            problems.append(f"vision_config.image_size = {vision.image_size}: the connector needs at least 2 x 2 "
                            f"patches of {vision.patch_size} pixels")  # fmt: skip
        if not 1 <= beats.input_patch_size <= beats.mel_bins:
            problems.append(f"beats_config.mel_bins = {beats.mel_bins} must be at least input_patch_size = "
                            f"{beats.input_patch_size}, which is at least 1")  # fmt: skip
        if problems:
            raise ValueError(_listed("sizes that do not go together", problems))

    @property
    def vision_layers(self) -> int:
        """How many SigLIP layers the selected hidden state needs (26 of 27 as released)."""
        return self.select_layer if self.select_layer >= 0 else self.vision.num_hidden_layers + 1 + self.select_layer

    def video_tokens(self, frames: int) -> int:
        """Tokens of a clip of `frames` frames: floor(T/2) * floor(grid/2)^2 (10 frames -> 845 as released)."""
        return (frames // 2) * (self.vision.grid // 2) ** 2

    def audio_tokens(self, fbank_frames: int) -> int:
        """Tokens of `fbank_frames` frames of 10 ms (2998 -> 1496 as released)."""
        patch = self.beats.input_patch_size
        return (fbank_frames // patch) * (self.beats.mel_bins // patch)

    def tower_bytes(self, clips: int, frames: int, fbank_frames: int, itemsize: int, eager: bool) -> dict[str, int]:
        """Bytes that each tower needs without gradient, by name (docs/memory.md)."""
        vision, patches, sounds = self.vision, self.vision.grid**2, self.audio_tokens(fbank_frames)
        scores = (4 + 2 * itemsize) * vision.num_attention_heads * patches if eager else 0
        inner = 2 * itemsize * (vision.intermediate_size + vision.hidden_size)
        return {
            "SigLIP": clips * frames * patches * (inner + scores),
            "connector": 5 * itemsize * clips * frames * patches * self.language.hidden_size,
            "BEATs": 4 * itemsize * clips * self.beats.encoder_attention_heads * sounds**2,
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> VideoLlama2Config:
        """Read `config.json` of a checkpoint folder.

        Raises:
            TensorFileError: naming the file, for a missing or malformed file or unsupported fields (all at once).
        """
        path = Path(folder) / CONFIG_NAME
        try:
            return cls.from_dict(read_json(path))
        except TensorFileError:
            raise
        except ValueError as error:
            raise TensorFileError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VideoLlama2Config:
        """Parse the released field names; raises ValueError listing every missing, unknown or unsupported field."""
        rest, problems = dict(data), []
        rope = rest.pop("rope_parameters", None) or {}  # transformers 5; version 4 writes rope_theta and rope_scaling
        rest |= rope if isinstance(rope, dict) else {"rope_type": rope}
        vision = _parse(VisionConfig, _take_block(rest, VISION_BLOCKS), "vision_config.", problems)
        beats = _parse(BeatsConfig, _take_block(rest, BEATS_BLOCKS), "beats_config.", problems)
        choices = _parse(Choices, rest, "", problems)
        language = _parse(LanguageConfig, rest, "", problems)
        for name, part, size in (("mm_hidden_size", vision, "hidden_size"),
                                 ("mm_hidden_size_a", beats, "encoder_embed_dim")):  # fmt: skip
            if part is not None and rest.get(name, getattr(part, size)) != getattr(part, size):
                problems.append(f"{name} = {rest[name]} differs from the tower's {size} = {getattr(part, size)}")
        if problems or choices is None or language is None or vision is None or beats is None:
            raise ValueError(_listed("not a model that this package is written for", problems))
        known = {f.name for part in (LanguageConfig, Choices) for f in fields(part)} - {"mm_vision_tower"}
        extra = {name: value for name, value in rest.items() if name not in known}
        return cls(language, vision, beats, choices.mm_vision_select_layer, extra)

    def to_dict(self) -> dict[str, Any]:
        """The released layout; the blocks are written only where they differ from the released constants."""
        data = {
            "model_type": "videollama2_qwen2",
            "architectures": ["Videollama2Qwen2ForCausalLM"],
            "mm_audio_tower": "audio_tower.bin",
            "mm_hidden_size": self.vision.hidden_size,
            "mm_hidden_size_a": self.beats.encoder_embed_dim,
            "hidden_size_a": self.language.hidden_size,
            "use_mm_proj": True,
        }
        data |= asdict(Choices(mm_vision_select_layer=self.select_layer)) | self.extra | asdict(self.language)
        del data["rope_type"]  # of rope_parameters alone, which is not written
        blocks = (("vision_config", self.vision), ("beats_config", self.beats))
        return data | {name: asdict(part) for name, part in blocks if part != type(part)()}


def _take_block(data: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Remove the blocks `names` from `data`; the first that is there wins, {} without one."""
    found = [block for name in names if (block := data.pop(name, None)) is not None]
    return found[0] if found else {}


def _parse(kind: type, data: Any, where: str, problems: list[str]) -> Any | None:
    """Build the checked dataclass `kind` from `data`, appending a line to `problems` for each fault."""
    if not isinstance(data, dict):
        problems.append(f"{where.rstrip('.')} = {data!r}: an object is needed")
        return None
    known = {f.name for f in fields(kind)}
    try:
        return kind(**{name: value for name, value in data.items() if name in known or name not in IGNORED})
    except ValidationError as error:
        words = {"missing": ": missing", "unexpected_keyword_argument": ": unknown field"}
        for item in error.errors(include_url=False):
            fault = words.get(item["type"], f" = {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
            problems.append(f"{where}{'.'.join(map(str, item['loc']))}{fault}")
        return None


def _listed(title: str, problems: list[str]) -> str:
    lines = [f"{title}:", *(f"  {problem}" for problem in problems)]
    return "\n".join([*lines, "Remedy: take config.json from the model's publisher, or correct these fields."])


RELEASED = VideoLlama2Config(LanguageConfig(3584, 18944, 28, 28, 4, 152064, eos_token_id=151645, pad_token_id=151643))
"""VideoLLaMA2.1-7B-AV: Qwen2-7B-Instruct with the default towers."""
