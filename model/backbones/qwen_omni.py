"""The thinker of Qwen2.5-Omni (3B, 7B) as a backbone: transformers' modules, our layout of media and positions.

Towers and decoder are those of `Qwen2_5OmniThinkerForConditionalGeneration`; its own forward and processor are not
used. They recompute positions from token ids and keep state between calls (`rope_deltas`), and the processor's frame
size, rate and padding have defaults that a call must override one by one. Here every clip has square frames and one
grid, so the order of its media tokens and their positions are a closed form (`media_layout`), equal to transformers'
`get_rope_index` (tests/test_qwen_omni.py).

Names of the released folder and ours:

    thinker.model.         language_model.model.        thinker.visual.        vision_tower.
    thinker.lm_head.       language_model.lm_head.      thinker.audio_tower.   audio_tower.

The towers project by themselves. `talker.` and `token2wav.` make speech and are left unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5OmniPreTrainedModel,
    Qwen2_5OmniTextConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from model.backbones.base import Backbone, Tower, switch_checkpointing
from model.backbones.videollama2 import splice
from model.backbones.videollama2.weights import Checkpoint, KeyCheck, Shape, write_shards
from utils.tensor_files import TensorFileError, read_json
from utils.types import AUDIO_PLACEHOLDER, VIDEO_PLACEHOLDER, Batch, MediaFormat, PackedInputs

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")
"""In config.json: the whole model as released; its thinker as transformers saves it."""
RULES = (
    ("language_model.model.", "thinker.model."),
    ("language_model.lm_head.", "thinker.lm_head."),
    ("vision_tower.", "thinker.visual."),
    ("audio_tower.", "thinker.audio_tower."),
)
"""(our prefix, released prefix)"""
SPEECH = re.compile(r"(talker|token2wav)\.")
"""Released names that are not read: the parts that speak."""
FRAME_SIZE = 448
"""Side of the square frames: 256 tokens for two frames, 1,280 for ten, 1,530 with ten seconds of sound. As released,
the processor would keep 720 x 1280 frames at 720 tokens for two, 3,600 for ten."""
FRAME_MEAN, FRAME_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, as in the released preprocessor_config.json."""


# ---- sizes


@dataclass(frozen=True)
class OmniConfig:
    """Everything that fixes the shapes of a thinker, as transformers' own configurations."""

    thinker: Qwen2_5OmniThinkerConfig

    def __post_init__(self) -> None:
        language, problems = self.language, []
        if self.thinker.tie_word_embeddings:
            problems.append("tie_word_embeddings = True: lm_head and embedding must be two matrices, as released")
        if set(language.layer_types) != {"full_attention"}:
            problems.append(f"layer_types = {sorted(set(language.layer_types))}: only full_attention is supported")
        marks = ("vision_start", "vision_end", "audio_start", "audio_end")
        for name in (f"{mark}_token_id" for mark in marks):
            if getattr(self.thinker, name, None) is None:
                problems.append(f"{name} is missing: the marks around a clip are known by it")
        for name, width in (("vision_config.out_hidden_size", self.thinker.vision_config.out_hidden_size),
                            ("audio_config.output_dim", self.thinker.audio_config.output_dim)):  # fmt: skip
            if width != language.hidden_size:
                problems.append(f"{name} = {width} differs from text_config.hidden_size = {language.hidden_size}")
        if problems:
            raise ValueError("unsupported thinker configuration:\n" + "\n".join(f"  {p}" for p in problems))

    @classmethod
    def from_folder(cls, folder: str | Path) -> OmniConfig:
        """Read config.json of the whole Omni model or of its thinker alone.

        The classes' own defaults are not the released sizes, so all three parts must be in the file.

        Raises:
            TensorFileError: the file is missing, malformed or not supported.
        """
        path = Path(folder) / "config.json"
        data = read_json(path)
        data = data.get("thinker_config", data)
        try:
            lacking = [part for part in ("text_config", "vision_config", "audio_config") if part not in data]
            if lacking:
                raise ValueError(f"{', '.join(lacking)} missing")
            return cls(Qwen2_5OmniThinkerConfig.from_dict(data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TensorFileError(f"{path}: {error}") from error

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """The layout of the released config.json, without the parts that speak."""
        thinker = {**self.thinker.to_dict(), "dtype": dtype}
        return {"model_type": MODEL_TYPES[0], "architectures": ["Qwen2_5OmniModel"], "dtype": dtype,
                "enable_audio_output": False, "thinker_config": thinker}  # fmt: skip

    @property
    def language(self) -> Qwen2_5OmniTextConfig:
        return self.thinker.text_config

    @property
    def cell(self) -> int:
        """Side of the square of pixels that one video token stands for (28 as released)."""
        return self.thinker.vision_config.patch_size * self.thinker.vision_config.spatial_merge_size

    def grid(self, frames: int, side: int = FRAME_SIZE) -> tuple[int, int, int]:
        """(time, height, width) of the video tokens of a clip; an odd frame is paired with itself."""
        pair = self.thinker.vision_config.temporal_patch_size
        return -(-frames // pair), side // self.cell, side // self.cell

    def video_tokens(self, frames: int, side: int = FRAME_SIZE) -> int:
        time, height, width = self.grid(frames, side)
        return time * height * width

    def audio_tokens(self, mel_frames: int) -> int:
        """A token for four frames of 10 ms: 25 a second (1,000 frames -> 250)."""
        return ((mel_frames - 1) // 2 - 1) // 2 + 1

    def tower_bytes(self, clips: int, frames: int, mel_frames: int, itemsize: int, eager: bool) -> dict[str, int]:
        """Bytes that each tower needs without gradient, by name."""
        vision, audio = self.thinker.vision_config, self.thinker.audio_config
        patches = clips * self.video_tokens(frames) * vision.spatial_merge_size**2
        frame, sounds = patches // (clips * -(-frames // vision.temporal_patch_size)), clips * mel_frames // 2
        scores = (4 + 2 * itemsize) * vision.num_heads * frame if eager else 0
        # gate, up and their product; the stream, its norm, queries, keys, values and what rotates them in float32
        per_patch = itemsize * (3 * vision.intermediate_size + 5 * vision.hidden_size) + 8 * vision.hidden_size
        return {
            "vision tower": patches * (per_patch + scores),
            "audio tower": sounds * itemsize * (2 * audio.encoder_ffn_dim + 5 * audio.d_model),
        }


def released_config(size: str = "7b") -> OmniConfig:
    """Qwen2.5-Omni-7B or -3B, without a file."""
    width, inner, layers, heads, shared, words = {
        "7b": (3584, 18944, 28, 28, 4, 152_064),
        "3b": (2048, 11008, 36, 16, 2, 151_936),
    }[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return OmniConfig(Qwen2_5OmniThinkerConfig(
        text_config={"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": words,
                     "rope_parameters": rope, "use_sliding_window": False},
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14,
                       "out_hidden_size": width, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112},
        audio_config={"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
                      "num_mel_bins": 128, "output_dim": width, "n_window": 100},
        vision_start_token_id=151_652, vision_end_token_id=151_653,
        audio_start_token_id=151_647, audio_end_token_id=151_648, tie_word_embeddings=False,
    ))  # fmt: skip


# ---- layout


class MediaLayout(NamedTuple):
    """Where the M media tokens of a clip stand, and at which positions."""

    order: Tensor
    """int64 [M]: index into [video tokens, audio tokens] in the order in which they are read."""
    positions: Tensor
    """int64 [3,M] (time, height, width), relative to the first position of the media."""
    end: int
    """Position of the marks behind, relative likewise."""


def media_layout(
    grid: tuple[int, int, int], audio_tokens: int, seconds_per_step: float, rate: int = 25, seconds_per_chunk: float = 2
) -> MediaLayout:
    """Interleave video and sound by time: in each chunk its video tokens, then its audio tokens.

    A video token (t, y, x) is heard and seen at time floor(t * seconds_per_step * rate), an audio token a at time a.
    Height and width do not advance with time.

    Args:
        grid: (time, height, width) of the video tokens.
        audio_tokens: of the same clip; may be 0.
        seconds_per_step: between video tokens that follow each other in time (2.0 for pairs of one frame a second).
        rate: positions per second.
        seconds_per_chunk: as released 2. Steps that are longer make longer chunks, a step each: transformers would
            split single tokens off each step there.
    """
    steps, height, width = grid
    time = (torch.arange(steps).float() * seconds_per_step * rate).long()
    video = torch.stack(torch.meshgrid(time, torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    positions = torch.cat([video, torch.arange(audio_tokens).expand(3, -1)], dim=1)
    chunk = int(rate * max(seconds_per_chunk, seconds_per_step))
    is_audio = torch.arange(positions.shape[1]) >= video.shape[1]
    run = positions[0] // chunk * 2 + is_audio
    order = run.argsort(stable=True)
    # The text goes on behind the last run alone, even if a video outlasts its sound.
    return MediaLayout(order, positions[:, order], int(positions[:, run == run.max()].max()) + 1)


def step_seconds(frames: int, mel_frames: int, pair: int) -> float:
    """Seconds between pairs of frames that are spread over a sound of 10 ms frames.

    To the quarter second of a frame: the sound of a 10-s clip with ten frames may last 9.97 s.
    """
    return pair * max(round(4 * mel_frames / (100 * frames)), 1) / 4


def to_patches(frames: Tensor, patch: int, merge: int, pair: int) -> Tensor:
    """[R,T,3,P,P] -> [R * T/pair * (P/patch)^2, 3 * pair * patch^2], the patches of one token beside each other."""
    if frames.shape[1] % pair:
        missing = pair - frames.shape[1] % pair
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    x = frames.unflatten(4, (-1, merge, patch)).unflatten(3, (-1, merge, patch)).unflatten(1, (-1, pair))
    # R, time, pair, channel, row, row in token, pixel row, column, column in token, pixel column
    return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(0, 5).flatten(1)


# ---- the model


class SteadyRotary(nn.Module):
    """Rotary embedding of three rows of positions, whose frequencies stay float32 when the model is cast.

    In transformers they are a buffer, which a cast to bfloat16 rounds: at position 2,000 by 0.2 rad.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        with torch.device("cpu"):  # also where the model around it is made on the meta device
            self.steady = (type(rotary)(rotary.config),)  # in a tuple, so that no cast or move of a module reaches it

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.steady[0](hidden, position_ids)


class OmniLanguageModel(Qwen2_5OmniPreTrainedModel):
    """The thinker's decoder and lm_head under the names that light checkpoints know."""

    config_class = Qwen2_5OmniTextConfig

    def __init__(self, decoder: Qwen2_5OmniPreTrainedModel, lm_head: nn.Linear) -> None:
        super().__init__(decoder.config)
        self.model, self.lm_head = decoder, lm_head

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value


class QwenOmni(Backbone):
    """The thinker with random weights; `load_backbone` fills it from a released folder.

    Args:
        config: sizes.
        attention: of the towers, "eager" or "sdpa".
    """

    def __init__(self, config: OmniConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        settings = deepcopy(config.thinker)  # modules note their attention in it
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(settings)
        # Until transformers 5.20 the towers stood beside the decoder, not in one model with it.
        holder = thinker.model if hasattr(thinker.model, "visual") else thinker
        self.language_model = OmniLanguageModel(getattr(holder, "language_model", thinker.model), thinker.lm_head)
        self.vision_tower, self.mm_projector = holder.visual, nn.Identity()
        self.audio_tower, self.mm_projector_a = holder.audio_tower, nn.Identity()
        for part in (self.language_model, self.vision_tower, self.audio_tower):
            part.set_attn_implementation(attention)
        self.decoder.rotary_emb = SteadyRotary(self.decoder.rotary_emb)
        self.vision_tower.rotary_pos_emb = SteadyRotary(self.vision_tower.rotary_pos_emb)
        self.media_format = MediaFormat(
            FRAME_SIZE, settings.audio_config.num_mel_bins, FRAME_MEAN, FRAME_STD, "log_mel", config.cell
        )

    def run_tower(self, tower: Tower, inputs: Tensor) -> Tensor:
        """Normalised frames [R,T,3,P,P] or log-mel energies [R,F,K] -> tokens [R,M,D].

        Raises:
            ValueError: the frames are no squares of a multiple of `OmniConfig.cell` pixels.
        """
        clips = len(inputs)
        if tower.kind == "audio":
            lengths = torch.full((clips,), inputs.shape[1], device=inputs.device)
            found = self.audio_tower(inputs.flatten(0, 1).T, feature_lens=lengths, aftercnn_lens=(lengths - 1) // 2 + 1)
            return found.last_hidden_state.unflatten(0, (clips, -1))
        if inputs.ndim != 5 or inputs.shape[3] != inputs.shape[4] or inputs.shape[3] % self.config.cell:
            raise ValueError(f"frames of shape {tuple(inputs.shape)}, but [R,T,3,P,P] is needed, P a multiple of "
                             f"{self.config.cell}")  # fmt: skip
        vision = self.config.thinker.vision_config
        merge = vision.spatial_merge_size
        time, height, width = self.config.grid(inputs.shape[1], inputs.shape[3])
        grid = torch.tensor([[time, height * merge, width * merge]], device=inputs.device).expand(clips, -1)
        patches = to_patches(inputs.to(self.dtype), vision.patch_size, merge, vision.temporal_patch_size)
        return self.vision_tower(patches, grid_thw=grid).pooler_output.unflatten(0, (clips, -1))

    def layout(
        self, batch: Batch, prompts: Sequence[Tensor], answers: Sequence[Tensor] | None, seg_token_id: int
    ) -> PackedInputs:
        """See `Backbone.layout`. The placeholder becomes the media between their marks, which the tokenizer's text
        never holds: `<|vision_bos|><|audio_bos|> ... <|audio_eos|><|vision_eos|>`, both marks at one position."""
        frames, side, sounds = batch.pixel_values.shape[1], batch.pixel_values.shape[3], batch.fbank.shape[1]
        thinker, grid, audio = self.config.thinker, self.config.grid(frames, side), self.config.audio_tokens(sounds)
        seconds = step_seconds(frames, sounds, thinker.vision_config.temporal_patch_size)
        media = media_layout(grid, audio, seconds, thinker.position_id_per_seconds, thinker.seconds_per_chunk)
        marked = [self._marked(prompt) for prompt in prompts]
        packed = splice(marked, answers, self.config.video_tokens(frames, side), audio, seg_token_id)
        index, order = packed.media_index, media.order.to(packed.media_index.device)
        positions = packed.position_ids.expand(3, -1, -1).clone()
        block = torch.full((3, len(order) + 4), media.end)
        block[:, :2], block[:, 2:-2] = -1, media.positions
        for row, prompt in enumerate(marked):
            at = (prompt == VIDEO_PLACEHOLDER).nonzero().flatten().tolist()
            if at:  # sound alone counts on like words
                first, behind = at[0] - 1, at[0] + len(order) + 2  # position of the media; place of the next word
                index[row, at[0] : at[0] + len(order)] = order
                positions[:, row, at[0] - 2 : behind] = first + block.to(index.device)
                positions[:, row, behind:] += first + media.end + 1 - behind
        return replace(packed, position_ids=positions)

    def _marked(self, prompt: Tensor) -> Tensor:
        """The prompt with the marks of its media around the placeholder."""
        thinker, pieces = self.config.thinker, []
        sound = [thinker.audio_start_token_id], [thinker.audio_end_token_id]
        both = [thinker.vision_start_token_id, *sound[0]], [*sound[1], thinker.vision_end_token_id]
        for token in prompt.tolist():
            before, after = {VIDEO_PLACEHOLDER: both, AUDIO_PLACEHOLDER: sound}.get(token, ((), ()))
            pieces += [*before, token, *after]
        return prompt.new_tensor(pieces)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the decoder's layers in backward, and those of the towers where they train."""
        for part in (self.language_model, self.vision_tower, self.audio_tower):
            switch_checkpointing(part, enabled)

    def reset_buffers(self, device: torch.device | str) -> None:
        """Compute the audio tower's sinusoids on `device`; the rotary frequencies are never on the meta device."""
        table = self.audio_tower.positional_embedding
        with torch.device("cpu"):
            fresh = type(table)(*table.positional_embedding.shape)
        self.audio_tower.positional_embedding = fresh.to(device)


# ---- weights


def from_released(name: str) -> str:
    """Our name of a released key; one that no rule explains comes back unchanged."""
    return next((ours + name.removeprefix(theirs) for ours, theirs in RULES if name.startswith(theirs)), name)


def to_released(name: str) -> str:
    """The released name of one of our parameters."""
    return next(theirs + name.removeprefix(ours) for ours, theirs in RULES if name.startswith(ours))


def check_keys(stored: Mapping[str, Shape], model: QwenOmni, complete: bool = False) -> list[KeyCheck]:
    """Explain every released name that is stored or expected, expected ones first.

    Args:
        stored: names of a checkpoint with their shapes.
        model: on any device.
        complete: nothing is tolerated (before saving).
    """
    expected = {to_released(name): tuple(x.shape) for name, x in model.state_dict().items()}
    checks = []
    for name in [*expected, *sorted(stored.keys() - expected.keys())]:
        have, need = stored.get(name), expected.get(name)
        if need is None and SPEECH.match(name) and not complete:
            checks.append(KeyCheck(name, "tolerated", have, need, "makes speech; left unread"))
        elif have is None or need is None:
            checks.append(KeyCheck(name, "missing" if have is None else "unexpected", have, need))
        else:
            checks.append(KeyCheck(name, "loaded" if have == need else "shape", have, need))
    return checks


def check_folder(config: OmniConfig, folder: str | Path) -> list[KeyCheck]:
    """`check_keys` of a folder's weights; reads no tensor of safetensors."""
    return check_keys(Checkpoint(folder).shapes, _empty(config))


def load_backbone(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> tuple[QwenOmni, list[str]]:
    """Build the thinker of a released folder. Names and shapes are compared before any tensor is read.

    Args:
        folder: config.json and safetensors, of the whole Omni model or with its thinker alone.
        dtype: of all weights; None keeps the stored types.
        attention: of the towers, "eager" or "sdpa".
        device: where the weights go.

    Returns:
        (backbone in eval mode, names that were left unread).

    Raises:
        TensorFileError: a file is missing or damaged, or names and shapes do not fit (all listed).
    """
    model, checkpoint = _empty(OmniConfig.from_folder(folder), attention), Checkpoint(folder, device)
    checks = check_keys(checkpoint.shapes, model)
    _refuse(checks, folder)
    read = (check.name for check in checks if check.status == "loaded")
    state = {from_released(name): checkpoint.get(name).to(dtype=dtype) for name in read}
    model.load_state_dict(state, strict=True, assign=True)
    model.reset_buffers(device)
    return model.eval(), [check.name for check in checks if check.status == "tolerated"]


def export_state(config: OmniConfig, state: Mapping[str, Tensor], folder: str | Path, dtype: str) -> list[Path]:
    """Write config.json and safetensors shards of the thinker under the released names.

    Args:
        config: sizes.
        state: our names, complete, without adapters.
        folder: made if needed.
        dtype: name of the weights' type, noted in config.json.

    Raises:
        TensorFileError: names or shapes are not exactly those of the config (all listed).
    """
    tensors = {to_released(name): tensor.contiguous() for name, tensor in state.items()}
    _refuse(check_keys({name: tuple(x.shape) for name, x in tensors.items()}, _empty(config), complete=True), folder)
    return write_shards(tensors, config.to_dict(dtype), Path(folder))


def _empty(config: OmniConfig, attention: str = "sdpa") -> QwenOmni:
    with torch.device("meta"):
        return QwenOmni(config, attention)


def _refuse(checks: Sequence[KeyCheck], folder: str | Path) -> None:
    if faults := [check for check in checks if check.is_fault]:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise TensorFileError(f"{folder}: {len(faults)} keys do not fit the model that config.json describes:{listed}")
