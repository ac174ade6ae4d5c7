"""SAM 2.1 as a segmenter: transformers' `Sam2VideoModel`, prompted by a [SEG] feature, with or without memory.

`model.sam_memory` says what a frame knows of the frames before it:

| | the [SEG] feature prompts | memory of earlier frames |
|---|---|---|
| none | every frame | none: each frame by itself, as with SAM |
| first | the first frame alone; the others get SAM 2's two "no point" tokens | read; an object absent there is lost |
| every | every frame | read; objects may appear late. Not how SAM 2 was trained: train `sam.memory_attention` too |

`Sam2VideoModel.forward` runs in inference mode and one object at a time, so the loop over frames is written here, over
the model's public modules; it equals the library's inference session (tests/test_sam2.py). What else differs from it:

* all queries of all clips go through one pass, and in training each frame is recomputed in backward, so that a clip
  holds the activations of one frame;
* one mask token in training and inference. The library chooses the best of three by rules that depend on the mode;
* SAM 2's hard decisions (`gate`: no mask where its score says that the object is absent, binary masks in memory) cut
  every gradient behind them, so they are never taken where gradients are recorded;
* the modules stay in eval mode when they are trained, as dropout in memory attention would make GRPO's ratios noisy;
* position codes are computed in float32 and rounded once. The library computes them in the type of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Sam2VideoConfig, Sam2VideoModel

from configs.schema import ModelConfig
from model.segmenters.base import Segmenter
from utils.errors import ConfigError, Problem, WeightsError
from utils.tensor_files import read_json

STRIDES = (4, 8, 16)
"""Pixels per value of the three feature maps (transformers, Sam2VisionConfig.backbone_feature_sizes at 1024)."""
LARGEST_STRIDE = 32
"""Of the last stage of Hiera: the image size is a multiple of it."""
ABSENT = -1024.0
"""Mask logits of an object that the score says is absent (Meta's sam2_base.py, NO_OBJ_SCORE)."""
CHUNK_VALUES = 2**28
"""Values of the widest activation that `Sam2Segmenter.encode` holds at once: 7 frames of Hiera-L at 1024 pixels."""
LARGE: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 144, "embed_dim_per_stage": [144, 288, 576, 1152],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "blocks_per_stage": [2, 6, 36, 4], "global_attention_blocks": [23, 33, 43], "window_size_per_stage": [8, 4, 16, 8],
    "num_attention_heads": 2,
}  # fmt: skip
"""Hiera-L of facebook/sam2.1-hiera-large, for plans where the folder is not there."""
MEMORY = ("memory_attention", "memory_encoder", "object_pointer_proj", "temporal_positional_encoding_projection_layer")
"""Modules that run only where frames have a memory."""


@dataclass
class Track:
    """What is kept of a clip's earlier frames for Q queries, while `Sam2Segmenter.step` goes through it."""

    prompts: Tensor
    """[Q,C]"""
    span: int
    """Pointers that a frame may read, and the unit of their distance in time: min(frames of the clip, 16)."""
    seen: int = 0
    """Frames so far."""
    memories: dict[int, Tensor] = field(default_factory=dict)
    """Frame -> [HW,Q,64]: of the first frame and the last six."""
    pointers: dict[int, Tensor] = field(default_factory=dict)
    """Frame -> [Q,C]: of the first frame and the last `span - 1`."""


class Sam2Segmenter(Segmenter):
    """SAM 2, batched over queries; frames are a loop.

    Args:
        sam: the model; its configuration gives all sizes.
        memory: see the module's text.
        prompt: "alone", or "behind_no_point": behind the two tokens that SAM 2 saw beside every prompt without points
            (as Sa2VA trains it).
        gate: take SAM 2's hard decisions where no gradient is recorded.
    """

    components = ("sam",)  # five parameters of SAM 2 belong to none of its modules
    encoders = ("sam.vision_encoder", "sam.mask_decoder.conv_s0", "sam.mask_decoder.conv_s1")
    dense_pe: Tensor
    top_pe: Tensor
    memory_pe: Tensor

    def __init__(
        self,
        sam: Sam2VideoModel,
        memory: Literal["none", "first", "every"] = "none",
        prompt: Literal["alone", "behind_no_point"] = "alone",
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.sam, self.memory, self.prompt, self.gate = sam, memory, prompt, gate
        self.memory_dtype = torch.bfloat16  # whatever the weights have, as SAM 2 was trained
        for name, code in self._position_codes().items():
            self.register_buffer(name, code, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_codes)
        rotary = sam.memory_attention.rotary_emb
        exact = {name: buffer.clone() for name, buffer in rotary.named_buffers() if buffer.is_floating_point()}
        rotary.register_forward_pre_hook(lambda module, _: _restore(module, exact))
        self.eval()

    @property
    def no_gradient(self) -> tuple[str, ...]:
        unused = () if self.memory != "none" else tuple(f"sam.{name}" for name in MEMORY)
        return (*self.encoders, "sam.prompt_encoder", "sam.mask_downsample", *unused)

    @property
    def image_size(self) -> int:
        return self.sam.config.image_size

    @property
    def prompt_width(self) -> int:
        return self.sam.config.mask_decoder_config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.sam.no_memory_embedding.dtype

    @property
    def grid(self) -> int:
        """Side of the coarsest feature map."""
        return self.image_size // STRIDES[-1]

    @property
    def feature_size(self) -> int:
        """E: values that are kept of a frame."""
        return 4 * self.prompt_width * self.grid**2

    @property
    def widest(self) -> int:
        """Values of the widest activation of a frame in the encoder: inside the MLPs of its first stage."""
        hiera = self.sam.config.vision_config.backbone_config
        return (self.image_size // STRIDES[0]) ** 2 * int(hiera.embed_dim_per_stage[0] * hiera.mlp_ratio)

    @property
    def frames_per_chunk(self) -> int:
        """Frames encoded at once."""
        return max(1, CHUNK_VALUES // self.widest)

    def train(self, mode: bool = True) -> Sam2Segmenter:
        """As `nn.Module.train`, but SAM 2 stays in eval mode (no dropout)."""
        super().train(mode)
        self.sam.eval()
        return self

    @torch.no_grad()
    def encode(self, sam_pixels: Tensor) -> Tensor:
        """Frames [B,T,3,Z,Z] -> [B,T,E]: three feature maps in a row, stride 4 (C/8), 8 (C/4) and 16 (C channels).

        Raises:
            ValueError: the frames are not squares of `image_size` pixels.
        """
        self.check_frames(sam_pixels)
        found = []
        for chunk in sam_pixels.flatten(0, 1).to(self.dtype).split(self.frames_per_chunk):
            maps = self.sam.get_image_features(chunk, return_dict=True).fpn_hidden_states  # [h*w,F,c] each
            found.append(torch.cat([x.permute(1, 2, 0).flatten(1) for x in maps], dim=1))
        return torch.cat(found).unflatten(0, sam_pixels.shape[:2])

    def decode(
        self,
        image_embeddings: Tensor,
        prompts: Tensor,
        clip_of_query: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        """[B,T,E], [Q,C] -> low-resolution logits [Q,T or k,4g,4g]; see `model.segmenters.base.Segmenter`.

        With memory, the k frames of `frame_index` are a clip of their own, in their order.
        """
        clips = self.clips_of(prompts, clip_of_query, len(image_embeddings))
        length = image_embeddings.shape[1]
        every = torch.arange(length, device=clips.device).expand(len(clips), -1)
        frames = every if frame_index is None else frame_index
        images, track = image_embeddings.flatten(0, 1), self.track(prompts, length)
        steps = (clips[:, None] * length + frames).unbind(1)
        return torch.stack([self.step(track, images, rows) for rows in steps], dim=1)

    def track(self, prompts: Tensor, length: int | None = None) -> Track:
        """The start of a clip for prompts [Q,C], before its first frame.

        Args:
            prompts: from [SEG] features.
            length: frames of the whole clip; None = not known yet, then the result is that of a clip of 16 or more.
        """
        longest = self.sam.config.max_object_pointers_in_encoder
        return Track(prompts, longest if length is None else min(length, longest))

    def step(self, track: Track, images: Tensor, rows: Tensor) -> Tensor:
        """The next frame of a clip: its masks; `track` then remembers it.

        Args:
            track: from `track`, with Q queries.
            images: [N,E] encoded frames, from `encode`.
            rows: int64 [Q] the frame of each query among them.

        Returns:
            [Q,4g,4g] mask logits.
        """
        now, followed = track.seen, self.memory != "none"
        memories = {now - t if t else 0: x for t, x in track.memories.items()}
        pointers = {now - t: x for t, x in track.pointers.items()}
        prompts = track.prompts if self.memory != "first" or now == 0 else None
        inputs = (images, rows, prompts, memories, pointers, track.span)
        if torch.is_grad_enabled():
            # Every frame by itself: the activations of a clip would be ten times as many (5 GB a query at 1024 pixels).
            found = checkpoint(self._frame, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            found = self._frame(*inputs)
        logits, memory, pointer = found
        if followed:
            track.memories[now], track.pointers[now] = memory, pointer
            kept = self.sam.num_maskmem - 1
            track.memories = {t: x for t, x in track.memories.items() if t == 0 or t > now - kept}
            track.pointers = {t: x for t, x in track.pointers.items() if t == 0 or t > now - track.span + 1}
        track.seen += 1
        return logits

    def upscale(self, logits: Tensor, sam_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """Low-resolution logits [T,4g,4g] of one clip -> float32 logits [T,*out_size], bilinear.

        Frames were stretched to the whole square, so there is nothing to cut and `sam_size` is not read.
        """
        return F.interpolate(logits[:, None].float(), tuple(out_size), mode="bilinear", align_corners=False)[:, 0]

    # ---- one frame

    def _frame(
        self,
        images: Tensor,
        rows: Tensor,
        prompts: Tensor | None,
        memories: dict[int, Tensor],
        pointers: dict[int, Tensor],
        span: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits [Q,4g,4g], and with memory the frame's own [HW,Q,64] and pointer [Q,C].

        `memories` are by frames back, the first frame's by 0; `pointers` are by frames back.
        """
        sam, width, grid = self.sam, self.prompt_width, self.grid
        hard = self.gate and not torch.is_grad_enabled()
        chosen = images[rows].to(self.dtype)
        finest, finer, top = chosen.split([2 * width * grid**2, width * grid**2, width * grid**2], dim=1)
        top = top.unflatten(1, (width, grid, grid))
        sparse, dense = self.prompt_tokens(prompts, len(rows))
        logits, _, mask_token, score = sam.mask_decoder(
            image_embeddings=self._recall(top, memories, pointers, span),
            image_positional_embeddings=self.dense_pe.to(self.dtype).expand(len(rows), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[
                finest.unflatten(1, (width // 8, 4 * grid, 4 * grid)),
                finer.unflatten(1, (width // 4, 2 * grid, 2 * grid)),
            ],
        )
        logits, absent = logits[:, 0, 0], score[:, 0] <= 0  # [Q,4g,4g], [Q,1]
        if hard:
            logits = logits.masked_fill(absent[..., None], ABSENT)
        if self.memory == "none":
            return logits, None, None
        pointer = sam.object_pointer_proj(mask_token[:, 0, 0])
        if hard:
            pointer = torch.where(absent, sam.no_object_pointer, pointer)
        return logits, self._remember(top, logits, absent, hard, prompts is not None), pointer

    def prompt_tokens(self, prompts: Tensor | None, queries: int) -> tuple[Tensor, Tensor]:
        """Sparse [Q,1,n,C] and dense [Q,C,g,g] embeddings of prompts [Q,C]; None = the two tokens of "no point"."""
        with torch.no_grad():
            nowhere = torch.zeros(1, 1, 1, 2, device=self.dense_pe.device, dtype=self.dtype)
            label = torch.full((1, 1, 1), -1, dtype=torch.int32, device=nowhere.device)
            no_point, dense = self.sam.prompt_encoder(nowhere, label, None, None)
        sparse = no_point.to(self.dtype).expand(queries, -1, -1, -1)
        if prompts is not None:
            own = prompts.to(self.dtype)[:, None, None]
            sparse = own if self.prompt == "alone" else torch.cat([sparse, own], dim=2)
        return sparse, dense.expand(queries, -1, -1, -1)

    def _recall(self, top: Tensor, memories: dict[int, Tensor], pointers: dict[int, Tensor], span: int) -> Tensor:
        """[Q,C,g,g] features -> the same with what earlier frames say about them."""
        sam, flat = self.sam, top.flatten(2).permute(2, 0, 1)  # [HW,Q,C]
        if not memories:
            return (flat + sam.no_memory_embedding).permute(1, 2, 0).unflatten(2, top.shape[-2:])
        # The first frame's code is the last row, -1; those of others count the frames back (transformers likewise).
        order = sorted(memories, key=lambda back: (back > 0, -back))
        values = [memories[back].to(self.dtype) for back in order]
        codes = [self.memory_pe.to(self.dtype) + sam.memory_temporal_positional_encoding[back - 1] for back in order]
        backs = [max(pointers), *(back for back in sorted(pointers) if back < max(pointers))]
        width = values[0].shape[2]
        pieces = top.shape[1] // width
        tokens = torch.stack([pointers[back] for back in backs]).unflatten(2, (pieces, width)).transpose(1, 2)
        values.append(tokens.flatten(0, 1))  # [p*C/64,Q,64]
        codes.append(self._pointer_codes(backs, span).repeat_interleave(pieces, 0)[:, None])
        seen = sam.memory_attention(
            current_vision_features=flat,
            current_vision_position_embeddings=self.top_pe.to(self.dtype),
            memory=torch.cat(values),
            memory_posision_embeddings=torch.cat([code.expand(-1, len(top), -1) for code in codes]),
            num_object_pointer_tokens=len(values[-1]),
        )  # [1,Q,HW,C]
        return seen[0].transpose(1, 2).unflatten(2, top.shape[-2:])

    def _pointer_codes(self, backs: list[int], span: int) -> Tensor:
        """[p,64] codes of pointers that are so many frames back."""
        sam = self.sam
        if not sam.config.enable_temporal_pos_encoding_for_object_pointers:
            return self.memory_pe.new_zeros(len(backs), self.memory_pe.shape[2], dtype=self.dtype)
        distance = torch.tensor(backs, device=self.memory_pe.device, dtype=torch.float32) / (span - 1)
        code = time_code(distance, self.prompt_width).to(self.dtype)
        return sam.temporal_positional_encoding_projection_layer(code)

    def _remember(self, top: Tensor, logits: Tensor, absent: Tensor, hard: bool, prompted: bool) -> Tensor:
        """Memory [HW,Q,64] of a frame: its features without memory, and its masks."""
        sam, config = self.sam, self.sam.config
        side = (self.image_size, self.image_size)
        exact = logits[:, None].to(torch.promote_types(logits.dtype, torch.float32))
        masks = F.interpolate(exact, side, mode="bilinear", align_corners=False)
        masks = (masks > 0).to(masks.dtype) if hard and prompted else masks.sigmoid()
        masks = masks * config.sigmoid_scale_for_mem_enc + config.sigmoid_bias_for_mem_enc
        memory, _ = sam.memory_encoder(top, masks.to(self.dtype))
        if hard and sam.occlusion_spatial_embedding_parameter is not None:
            memory = memory + absent[..., None, None] * sam.occlusion_spatial_embedding_parameter[..., None, None]
        return memory.to(self.memory_dtype).flatten(2).permute(2, 0, 1)

    @torch.no_grad()
    def _position_codes(self) -> dict[str, Tensor]:
        """Codes of the image for the decoder [1,C,g,g] and for memory [HW,1,C], and of memories [HW,1,64]; float32."""
        sam, grid = self.sam, self.grid
        codes = {"dense_pe": sam.get_image_wide_positional_embeddings()}
        for name, module, width in (
            ("top_pe", sam.vision_encoder.neck.position_encoding, self.prompt_width),
            ("memory_pe", sam.memory_encoder.position_encoding, sam.config.memory_encoder_output_channels),
        ):
            code = module(torch.Size((1, width, grid, grid)), self.sam.device, torch.float32)
            codes[name] = code.flatten(2).permute(2, 0, 1)
        return {name: code.clone() for name, code in codes.items()}  # the library keeps its own and hands them out


def build_sam2(config: ModelConfig, weights: bool = True) -> Sam2Segmenter:
    """Build SAM 2 in float32 and load its weights strictly.

    Args:
        config: `sam_checkpoint` is a folder in transformers' layout (as facebook/sam2.1-hiera-large: config.json and
            model.safetensors), `sam_image_size` any multiple of 32; `sam_memory`, `sam_prompt` and `sam_gate`.
        weights: False = random weights of the folder's sizes, or of Hiera-L's where there is no folder.

    Raises:
        ConfigError: no such folder, another kind of model, or an image size that is no multiple of 32.
        WeightsError: the weights are missing or damaged or do not fit; all keys are named.
    """
    side, folder = config.sam_image_size, Path(config.sam_checkpoint)
    if side % LARGEST_STRIDE:
        rule = f"must be a multiple of {LARGEST_STRIDE} for SAM 2"
        raise ConfigError([Problem("model.sam_image_size", side, rule, "use 1024, which it was trained at, or 512")])
    sizes = _resized(_large() if not weights and not folder.exists() else _read_sizes(folder), side)
    options = config.sam_memory, config.sam_prompt, config.sam_gate
    if not weights:
        return Sam2Segmenter(Sam2VideoModel(sizes), *options)
    try:
        sam, report = Sam2VideoModel.from_pretrained(
            folder, config=sizes, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            attn_implementation=config.attention, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder}: not readable as SAM 2 ({error}). Remedy: restore model.safetensors.") from error
    report["mismatched_keys"] = [name for name, *_ in report["mismatched_keys"]]  # with both shapes
    kinds = "missing_keys", "unexpected_keys", "mismatched_keys"
    wrong = [f"{kind} {sorted(report[kind])}" for kind in kinds if report[kind]]
    if wrong:
        raise WeightsError(f"{folder}: {'; '.join(wrong)}. Remedy: restore the folder of one released SAM 2.1.")
    return Sam2Segmenter(sam, *options)


def _large() -> Sam2VideoConfig:
    """Sizes of the released SAM 2.1 with Hiera-L."""
    channels = LARGE["embed_dim_per_stage"][::-1]
    vision = {"model_type": "sam2_vision_model", "backbone_channel_list": channels, "backbone_config": dict(LARGE)}
    return Sam2VideoConfig(vision_config=vision)


def _read_sizes(folder: Path) -> Sam2VideoConfig:
    """config.json of a folder in transformers' layout."""
    path = folder / "config.json"
    remedy = "name a folder with config.json and model.safetensors, as facebook/sam2.1-hiera-large has them"
    if not path.is_file():
        rule = "holds no config.json (SAM 2 is read in transformers' layout alone, not as Meta's .pt)"
        raise ConfigError([Problem("model.sam_checkpoint", str(folder), rule, remedy)])
    kind = read_json(path).get("model_type")
    if kind != Sam2VideoConfig.model_type:
        rule = f"config.json says model_type {kind!r}, not {Sam2VideoConfig.model_type!r}"
        raise ConfigError([Problem("model.sam_checkpoint", str(folder), rule, remedy)])
    return Sam2VideoConfig.from_pretrained(folder)


def _resized(config: Sam2VideoConfig, side: int) -> Sam2VideoConfig:
    """The same model for squares of `side` pixels (nothing in the library checks that its four fields agree)."""
    maps = [[side // stride] * 2 for stride in STRIDES]
    config.image_size = config.prompt_encoder_config.image_size = side
    config.vision_config.backbone_config.image_size = [side, side]
    config.vision_config.backbone_feature_sizes = maps
    config.memory_attention_rope_feat_sizes = maps[-1]
    # The best of three masks by a rule that holds in eval mode alone would be chosen otherwise.
    config.mask_decoder_config.dynamic_multimask_via_stability = False
    config.multimask_output_in_sam = False
    return config


def _refresh_codes(segmenter: Sam2Segmenter, incompatible_keys: object = None) -> None:
    """Recompute the position codes after the random matrix behind one of them was loaded."""
    matrix = segmenter.sam.shared_image_embedding.positional_embedding
    if matrix.dtype == torch.float32 and not matrix.is_meta:
        segmenter.dense_pe.copy_(segmenter.sam.get_image_wide_positional_embeddings())


def _restore(module: nn.Module, exact: dict[str, Tensor]) -> None:
    """Give rotary frequencies their float32 values back, which `.to(bfloat16)` has rounded."""
    for name, value in exact.items():
        if getattr(module, name).dtype != value.dtype:
            setattr(module, name, value.to(getattr(module, name).device))


def time_code(distance: Tensor, width: int) -> Tensor:
    """float32 [n] -> [n,width] sines, then cosines, of "Attention is all you need" (its section 3.5)."""
    pairs = torch.arange(width // 2, device=distance.device) // 2
    angles = distance[:, None] / 10_000.0 ** (4 * pairs / width)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
