"""Sizes of a VideoLLaMA2.1-AV model, read from the released `config.json` layout.

The released file holds the language model's sizes and the `mm_*` names, but neither SigLIP's sizes (they live in the
folder `mm_vision_tower` names) nor those of BEATs (constants of the published code, BEATs.py:26-62). Both may be given
in extra blocks `vision_config` and `beats_config`; without a block the released constants hold.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.tensor_files import TensorFileError, read_json

CONFIG_NAME = "config.json"

VISION_BLOCKS = ("vision_config", "fixture_vision_config")
BEATS_BLOCKS = ("beats_config", "fixture_beats_config")

IGNORED_VISION = frozenset(
    {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "vision_use_head"}
)
"""Bookkeeping of transformers, without effect on the tower."""

IGNORED_BEATS = frozenset(
    {"dropout", "dropout_input", "attention_dropout", "activation_dropout", "encoder_layerdrop", "predictor_dropout",
     "hidden_size", "finetuned_model"}
)  # fmt: skip
"""Dropout and layerdrop are never applied here: the tower is deterministic in training too (the published code drops 5%
of the layers of a frozen tower). `hidden_size` is unused by the tower; `finetuned_model` only adds the predictor."""

FIXED_BEATS: dict[str, Any] = {
    "activation_fn": "gelu",
    "deep_norm": True,
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "conv_bias": False,
}
"""Choices of BEATs iter3+ that the encoder is written for."""

FIXED_TOP: dict[str, Any] = {
    "mm_projector_type": "stc_connector_v35",
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
"""Choices of VideoLLaMA2.1-7B-AV (scripts/custom/va_joint.sh) that this package is written for."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class BeatsConfig:
    """BEATs' sizes, named as in the published BEATs.py; the defaults are iter3+ AS2M (cpt2)."""

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


@dataclass(frozen=True)
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
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


@dataclass(frozen=True)
class VideoLlama2Config:
    """Everything that fixes the shapes of a VideoLLaMA2.1-AV model."""

    language: LanguageConfig
    vision: VisionConfig = VisionConfig()
    beats: BeatsConfig = BeatsConfig()
    select_layer: int = -2
    """Index into SigLIP's hidden_states (embeddings first, then one per layer; no post_layernorm)."""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    """Fields of the file that fix no shape (num_frames, tokenizer_*, ...); written back unchanged."""

    def __post_init__(self) -> None:
        problems = _check_sizes(self)
        if problems:
            raise ValueError("VideoLLaMA2 config is inconsistent:\n" + "\n".join(f"  {p}" for p in problems))

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

    @classmethod
    def from_folder(cls, folder: str | Path) -> VideoLlama2Config:
        """Read `config.json` of a checkpoint folder.

        Raises:
            TensorFileError: naming the file, for a missing or malformed file or unsupported fields (all at once).
        """
        path = Path(folder) / CONFIG_NAME
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise TensorFileError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VideoLlama2Config:
        """Parse the released field names; raises ValueError listing every missing, unknown or unsupported field."""
        rest = dict(data)
        problems: list[str] = []
        _check_fixed(rest, FIXED_TOP, "", problems)
        if "siglip" not in str(rest.get("mm_vision_tower", "siglip")).lower():
            problems.append(f"mm_vision_tower = {rest['mm_vision_tower']!r}: only SigLIP towers are supported")
        select_layer = rest.pop("mm_vision_select_layer", -2)
        if type(select_layer) is not int:
            problems.append(f"mm_vision_select_layer = {select_layer!r}: an integer is needed")
        vision = _take_block(rest, VISION_BLOCKS, problems)
        beats = _take_block(rest, BEATS_BLOCKS, problems)
        _check_fixed(beats, FIXED_BEATS, "beats_config.", problems)
        beats = {k: v for k, v in beats.items() if k not in FIXED_BEATS}
        parsed_vision = _parse(VisionConfig, vision, "vision_config.", IGNORED_VISION, problems)
        parsed_beats = _parse(BeatsConfig, beats, "beats_config.", IGNORED_BEATS, problems)
        rest = _flatten_rope(rest, problems)
        names = {f.name for f in fields(LanguageConfig)}
        language = _parse(LanguageConfig, {k: v for k, v in rest.items() if k in names}, "", frozenset(), problems)
        for name, part, size in (("mm_hidden_size", parsed_vision, "hidden_size"),
                                 ("mm_hidden_size_a", parsed_beats, "encoder_embed_dim")):  # fmt: skip
            if part is not None and rest.get(name, getattr(part, size)) != getattr(part, size):
                problems.append(f"{name} = {rest[name]} differs from the tower's {size} = {getattr(part, size)}")
        if problems or language is None or parsed_vision is None or parsed_beats is None:
            raise ValueError("unsupported model configuration:\n" + "\n".join(f"  {p}" for p in problems))
        extra = {k: v for k, v in rest.items() if k not in names and k not in FIXED_TOP}
        return cls(language, parsed_vision, parsed_beats, select_layer, extra)

    def to_dict(self) -> dict[str, Any]:
        """The released layout; the blocks are written only where they differ from the released constants."""
        data: dict[str, Any] = {
            "model_type": "videollama2_qwen2",
            "architectures": ["Videollama2Qwen2ForCausalLM"],
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_audio_tower": "audio_tower.bin",
            "mm_hidden_size": self.vision.hidden_size,
            "mm_hidden_size_a": self.beats.encoder_embed_dim,
            "use_mm_proj": True,
        }
        data |= self.extra | FIXED_TOP | asdict(self.language)
        data |= {"mm_vision_select_layer": self.select_layer, "hidden_size_a": self.language.hidden_size}
        if self.vision != VisionConfig():
            data["vision_config"] = asdict(self.vision)
        if self.beats != BeatsConfig():
            data["beats_config"] = asdict(self.beats)
        return data


def _take_block(data: dict[str, Any], names: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """Remove the blocks `names` from `data`; the first that is there wins, {} without one."""
    found = [(name, block) for name in names if (block := data.pop(name, None)) is not None]
    if found and not isinstance(found[0][1], dict):
        problems.append(f"{found[0][0]} = {found[0][1]!r}: an object is needed")
        return {}
    return dict(found[0][1]) if found else {}


def _check_fixed(data: dict[str, Any], fixed: dict[str, Any], where: str, problems: list[str]) -> None:
    for name, value in fixed.items():
        if data.get(name, value) != value:
            problems.append(f"{where}{name} = {data[name]!r}: only {value!r} is supported")


def _flatten_rope(data: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Accept `rope_theta` (transformers 4) and `rope_parameters` (transformers 5)."""
    rest = dict(data)
    rope = rest.pop("rope_parameters", None) or {}
    if rest.get("rope_scaling") is not None or rope.get("rope_type", "default") != "default":
        problems.append("rope_scaling / rope_parameters: only the default rotary embedding is supported")
    if "rope_theta" in rope:
        rest["rope_theta"] = rope["rope_theta"]
    return rest


def _parse(kind: type, data: dict[str, Any], where: str, ignored: frozenset[str], problems: list[str]) -> Any | None:
    """Build dataclass `kind` from `data`, appending a line to `problems` for each fault."""
    known = {f.name: f for f in fields(kind)}
    before = len(problems)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in ignored:
            continue
        if name not in known:
            problems.append(f"{where}{name}: unknown field")
            continue
        wanted = str(known[name].type)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if "int" in wanted and isinstance(value, list) and "None" in wanted:
            value = value[0]  # a list of end tokens: the first ends an answer
        elif "int" in wanted and not (isinstance(value, int) and numeric) and not ("None" in wanted and value is None):
            problems.append(f"{where}{name} = {value!r}: an integer is needed")
        elif wanted == "float" and not numeric:
            problems.append(f"{where}{name} = {value!r}: a number is needed")
        elif wanted == "str" and not isinstance(value, str):
            problems.append(f"{where}{name} = {value!r}: a string is needed")
        values[name] = value
    for name, spec in known.items():
        if spec.default is MISSING and name not in values:
            problems.append(f"{where}{name}: missing")
    return kind(**values) if len(problems) == before else None


def _check_sizes(config: VideoLlama2Config) -> list[str]:
    """Faults between sizes, each naming field, value and rule."""
    lang, vision, beats = config.language, config.vision, config.beats
    problems = []
    for name, size, divisor_name, divisor in (
        ("hidden_size", lang.hidden_size, "2 * num_attention_heads", 2 * lang.num_attention_heads),
        ("num_attention_heads", lang.num_attention_heads, "num_key_value_heads", lang.num_key_value_heads),
        ("vision_config.hidden_size", vision.hidden_size, "num_attention_heads", vision.num_attention_heads),
        ("beats_config.encoder_embed_dim", beats.encoder_embed_dim, "encoder_attention_heads",
         beats.encoder_attention_heads),
        ("beats_config.encoder_embed_dim", beats.encoder_embed_dim, "conv_pos_groups", beats.conv_pos_groups),
        ("beats_config.num_buckets", beats.num_buckets, "4", 4),
    ):  # fmt: skip
        if divisor < 1 or size < 1 or size % divisor:
            problems.append(f"{name} = {size} must be a positive multiple of {divisor_name} = {divisor}")
    if not 0 <= config.vision_layers <= vision.num_hidden_layers:
        problems.append(f"mm_vision_select_layer = {config.select_layer}: out of range for "
                        f"{vision.num_hidden_layers} layers")  # fmt: skip
    if vision.grid < 2:
        problems.append(f"vision_config.image_size = {vision.image_size}: the connector needs at least 2 x 2 patches "
                        f"of {vision.patch_size} pixels")  # fmt: skip
    if beats.mel_bins < beats.input_patch_size:
        problems.append(f"beats_config.mel_bins = {beats.mel_bins} must be at least input_patch_size = "
                        f"{beats.input_patch_size}")  # fmt: skip
    return problems


RELEASED = VideoLlama2Config(LanguageConfig(3584, 18944, 28, 28, 4, 152064, eos_token_id=151645, pad_token_id=151643))
"""VideoLLaMA2.1-7B-AV: Qwen2-7B-Instruct with the default towers."""
