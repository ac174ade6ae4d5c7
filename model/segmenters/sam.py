"""SAM as AURORA uses it: frames are encoded once, and a prompt is decoded for all frames of its clip.

The classes and the weights are those of the `segment_anything` package, which is never edited. This adapter adds what
the package leaves to its caller:

* any image size: every grid and table follows from `image_size`, and a checkpoint made at another size (1024) has its
  position tables resampled. The released code works at 224 with the same bicubic resampling, but writes 224 and 14
  into the package (released code segment_anything/modeling/image_encoder.py:56, prompt_encoder.py:183 and 218);
* a strict load: each missing, unexpected or misshapen key is named (released code build_sam.py:161: strict=False);
* one decoder call for Q prompts on T frames. `MaskDecoder.predict_masks` repeats every image for every prompt (Q*T
  images x Q prompts), so `Segmenter.decode` feeds the same transformer and upscaling modules without that repeat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from model.segmenters.base import Segmenter
from utils.errors import ConfigError, Problem, WeightsError
from utils.tensor_files import load_safetensors, load_state

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B in 0..255 that the frames were normalised by (segment_anything/build_sam.py:99)."""

PIXEL_STD = (58.395, 57.12, 57.375)
"""Standard deviation likewise (segment_anything/build_sam.py:100)."""

POSITION_TABLE = "image_encoder.pos_embed"
RELATIVE_TABLE = "image_encoder.blocks.{}.attn.rel_pos_{}"

ATTENTION_VALUES = 2**30
"""Attention values that `Segmenter.encode` holds at once: 2 GiB in bfloat16, 4 frames of ViT-H at 1024 pixels."""


@dataclass(frozen=True)
class SamSizes:
    """Sizes of a SAM. Fields with a default are shared by ViT-H, ViT-L and ViT-B (segment_anything/build_sam.py)."""

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    global_blocks: tuple[int, ...]
    """Encoder blocks with global attention; all others attend within windows."""
    patch_size: int = 16
    window_size: int = 14
    mlp_ratio: float = 4.0
    prompt_width: int = 256
    """C: width of a prompt, of the image embedding and of the mask decoder."""
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_head_depth: int = 3
    iou_head_width: int = 256
    mask_channels: int = 16
    """Hidden channels of the mask-prompt encoder (stored in every checkpoint, not used here)."""
    multimask_outputs: int = 3
    """Extra mask tokens (stored in every checkpoint); the single-mask token is the one decoded."""

    @classmethod
    def from_json(cls, path: str | Path) -> SamSizes:
        """Read the sizes of a small SAM; unknown and missing fields are a ConfigError that names them."""
        path = Path(path)
        values = json.loads(path.read_text())
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            rule = f"has unknown fields {unknown} and lacks {missing}"
            raise ConfigError([Problem("model.sam_type", str(path), rule, f"use the fields {sorted(known)}")])
        return cls(**{**values, "global_blocks": tuple(values["global_blocks"])})

    def to_json(self, path: str | Path) -> None:
        """Write the sizes as `from_json` reads them."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


SAM_SIZES = {
    "vit_h": SamSizes(1280, 32, 16, (7, 15, 23, 31)),
    "vit_l": SamSizes(1024, 24, 16, (5, 11, 17, 23)),
    "vit_b": SamSizes(768, 12, 12, (2, 5, 8, 11)),
}
"""The released sizes (segment_anything/build_sam.py:14-45)."""


class SamSegmenter(Segmenter):
    """SAM, batched over queries and frames."""

    components = ("sam.image_encoder", "sam.prompt_encoder", "sam.mask_decoder")
    no_gradient = ("sam.image_encoder", "sam.prompt_encoder")
    dense_pe: Tensor

    def __init__(self, sam: Sam, sizes: SamSizes) -> None:
        super().__init__()
        self.sam = sam
        self.sizes = sizes
        # The package recomputes the positional encoding in float32 against a matrix that `.to(bfloat16)` has rounded,
        # and then fails on the mixed types. Computed once, in float32, only its result is ever rounded.
        self.register_buffer("dense_pe", sam.prompt_encoder.get_dense_pe(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_dense_pe)

    @property
    def image_size(self) -> int:
        return self.sam.image_encoder.img_size

    @property
    def prompt_width(self) -> int:
        return self.sizes.prompt_width

    @property
    def dtype(self) -> torch.dtype:
        return self.sam.mask_decoder.iou_token.weight.dtype

    @property
    def frames_per_chunk(self) -> int:
        """Frames encoded at once, so that the global attention of one block stays within ATTENTION_VALUES."""
        grid = self.image_size // self.sizes.patch_size
        return max(1, ATTENTION_VALUES // (self.sizes.encoder_heads * grid**4))

    @torch.no_grad()
    def encode(self, sam_pixels: Tensor) -> Tensor:
        """Embed normalised, padded frames [B,T,3,Z,Z] as [B,T,C,h,w], without gradient: the encoder is never trained.

        Raises:
            ValueError: the frames are not squares of `image_size` pixels.
        """
        self.check_frames(sam_pixels)
        frames = sam_pixels.flatten(0, 1).to(self.dtype)
        chunks = [self.sam.image_encoder(chunk) for chunk in frames.split(self.frames_per_chunk)]
        return torch.cat(chunks).unflatten(0, sam_pixels.shape[:2])

    def decode(
        self,
        image_embeddings: Tensor,
        prompts: Tensor,
        clip_of_query: Tensor | None = None,
        frame_index: Tensor | None = None,
    ) -> Tensor:
        """[B,T,C,h,w], [Q,C] -> low-resolution logits [Q,T or k,4h,4w]; see `model.segmenters.base.Segmenter`.

        One pass of the decoder for all Q*T frames, with the package's own modules; equal to calling
        `sam.mask_decoder(frame, dense_pe, prompt, no_mask, multimask_output=False)` for one frame after another
        (paper section 3.1: the [SEG] feature is the visual prompt; released code LISA_sft_distill.py:353-375).
        """
        clips = self.clips_of(prompts, clip_of_query, len(image_embeddings))
        chosen = image_embeddings[clips] if frame_index is None else image_embeddings[clips[:, None], frame_index]
        queries, frames = chosen.shape[:2]
        decoder = self.sam.mask_decoder
        images = chosen.flatten(0, 1).to(self.dtype)
        prompt_tokens = prompts.to(self.dtype).repeat_interleave(frames, 0)[:, None]  # [Q*T,1,C]
        # Looked up instead of read as weights: ZeRO-3 gathers a parameter when its own module is called.
        row = torch.arange(decoder.num_mask_tokens, device=prompts.device)
        output_tokens = torch.cat([decoder.iou_token(row[:1]), decoder.mask_tokens(row)])
        tokens = torch.cat([output_tokens.expand(len(images), -1, -1), prompt_tokens], dim=1)
        no_mask = self.sam.prompt_encoder.no_mask_embed(row[:1]).reshape(1, -1, 1, 1)
        positions = self.dense_pe.to(self.dtype).expand(len(images), -1, -1, -1)

        token_states, image_states = decoder.transformer(images + no_mask, positions, tokens)
        upscaled = decoder.output_upscaling(image_states.transpose(1, 2).unflatten(2, images.shape[-2:]))
        mask_token = token_states[:, 1]  # index 0 is the IoU token; 1 is the mask token of multimask_output=False
        weights = decoder.output_hypernetworks_mlps[0](mask_token)  # [Q*T,C/8]
        return torch.einsum("nc,nchw->nhw", weights, upscaled).unflatten(0, (queries, frames))

    def upscale(self, logits: Tensor, sam_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """Low-resolution logits [T,4h,4w] of one clip -> float32 logits [T,*out_size], bilinear.

        As `Sam.postprocess_masks`: up to the padded square, cut to `sam_size` (height, width inside the square), then
        to `out_size` (height, width), in float32 whatever the decoder's type.
        """
        square = F.interpolate(logits[:, None].float(), (self.image_size,) * 2, mode="bilinear", align_corners=False)
        inside = square[..., : sam_size[0], : sam_size[1]]
        return F.interpolate(inside, tuple(out_size), mode="bilinear", align_corners=False)[:, 0]


def build_segmenter(sam_type: str, image_size: int, checkpoint: str | Path | None = None) -> SamSegmenter:
    """Build SAM and load its weights strictly.

    Args:
        sam_type: vit_h, vit_l, vit_b, or the path of a JSON with the fields of `SamSizes`.
        image_size: Z, side of the square input in pixels (1024 as released, 224 in the released AURORA code).
        checkpoint: .pth or .safetensors with the released key names, at this or another image size; None = random.

    Raises:
        ConfigError: an unknown type, or an image size that is no multiple of the patch.
        WeightsError: the checkpoint is missing or does not fit, see `read_sam`.
    """
    if sam_type not in SAM_SIZES and not Path(sam_type).is_file():
        remedy = f"give one of {', '.join(SAM_SIZES)} or an existing JSON of sizes"
        raise ConfigError([Problem("model.sam_type", sam_type, "is no SAM that is known", remedy)])
    sizes = SAM_SIZES.get(sam_type) or SamSizes.from_json(sam_type)
    if image_size <= 0 or image_size % sizes.patch_size:
        rule = f"must be a multiple of SAM's patch, {sizes.patch_size}"
        raise ConfigError([Problem("model.sam_image_size", image_size, rule, "use 1024 or 224 with the released SAM")])
    segmenter = SamSegmenter(assemble_sam(sizes, image_size), sizes)
    if checkpoint is not None:
        segmenter.sam.load_state_dict(read_sam(segmenter, checkpoint))
        _refresh_dense_pe(segmenter)
    return segmenter.eval()


def read_sam(segmenter: SamSegmenter, checkpoint: str | Path) -> dict[str, Tensor]:
    """The state of `segmenter.sam` in a checkpoint, its position tables resampled to the segmenter's image size.

    Raises:
        WeightsError: see `read_sam_file`; or missing, unexpected or misshapen keys, all of them named.
    """
    state, expected, sizes = read_sam_file(checkpoint), segmenter.sam.state_dict(), segmenter.sizes
    if problems := sam_problems(state, segmenter):
        kind = recognise(state)
        here = next((name for name, other in SAM_SIZES.items() if other == sizes), "a SAM of its own sizes")
        guess = f"; the file holds {kind}, the model is {here}. Remedy: set model.sam_type: {kind}" if kind else ""
        listed = "\n  ".join(problems)
        raise WeightsError(f"{checkpoint} does not fit this SAM (check model.sam_type){guess}:\n  {listed}")
    for key in position_tables(sizes.global_blocks):
        wanted = expected[key].shape
        if state[key].shape != wanted:
            absolute = key == POSITION_TABLE
            state[key] = (resample_grid(state[key], wanted[1:3]) if absolute
                          else resample_relative(state[key], wanted[0]))  # fmt: skip
    return state


def read_sam_file(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, read without running any code that it may hold.

    Raises:
        WeightsError: no such file, another ending, damaged, or holding more than tensors.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise WeightsError(f"model.sam_checkpoint = {path}: does not exist. Remedy: download it, or correct the path.")
    if path.suffix not in (".safetensors", ".pth"):
        raise WeightsError(f"model.sam_checkpoint = {path}: must end in .pth or .safetensors")
    return load_safetensors(path) if path.suffix == ".safetensors" else load_state(path)


def sam_problems(state: Mapping[str, Tensor], segmenter: SamSegmenter) -> list[str]:
    """Every key that is missing, unexpected or of another shape; tables that can be resampled may differ in length."""
    expected, tables = segmenter.sam.state_dict(), position_tables(segmenter.sizes.global_blocks)

    def fits(stored: Tensor, wanted: Tensor, is_table: bool) -> bool:
        if is_table:
            return stored.dim() == wanted.dim() and stored.shape[-1] == wanted.shape[-1]
        return stored.shape == wanted.shape

    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    return problems + [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and not fits(state[key], value, key in tables)
    ]


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Name of the released SAM whose encoder has the width and depth of `state`, None without one."""
    table = state.get(POSITION_TABLE)
    if table is None or table.dim() != 4:
        return None
    blocks = {m.group(1) for key in state if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", key))}
    found = (table.shape[-1], len(blocks))
    return next((name for name, s in SAM_SIZES.items() if (s.encoder_width, s.encoder_depth) == found), None)


def position_tables(global_blocks: tuple[int, ...]) -> set[str]:
    """Names of the tables whose length follows from the image size; those of windowed blocks depend on the window."""
    return {POSITION_TABLE} | {RELATIVE_TABLE.format(block, axis) for block in global_blocks for axis in "hw"}


def resample_grid(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Absolute positions [1,h,w,D] on a grid of another size, bicubic as in the released code."""
    channels_first = table.permute(0, 3, 1, 2).float()
    moved = F.interpolate(channels_first, tuple(size), mode="bicubic", align_corners=False)
    return moved.permute(0, 2, 3, 1).contiguous().to(table.dtype)


def resample_relative(table: Tensor, length: int) -> Tensor:
    """Relative positions [2h-1, D/heads] at another length: an image of unchanged width, bicubic likewise."""
    image = table[None, None].float()
    return F.interpolate(image, (length, table.shape[1]), mode="bicubic", align_corners=False)[0, 0].to(table.dtype)


def assemble_sam(sizes: SamSizes, image_size: int) -> Sam:
    """The package's classes, wired as `segment_anything/build_sam.py:_build_sam` but with all sizes given."""
    grid = image_size // sizes.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.encoder_width,
            depth=sizes.encoder_depth,
            num_heads=sizes.encoder_heads,
            mlp_ratio=sizes.mlp_ratio,
            out_chans=sizes.prompt_width,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=sizes.window_size,
            global_attn_indexes=sizes.global_blocks,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.prompt_width,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=sizes.mask_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=sizes.prompt_width,
            transformer=TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_width,
                num_heads=sizes.decoder_heads,
                mlp_dim=sizes.decoder_mlp,
            ),
            num_multimask_outputs=sizes.multimask_outputs,
            iou_head_depth=sizes.iou_head_depth,
            iou_head_hidden_dim=sizes.iou_head_width,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def _refresh_dense_pe(segmenter: SamSegmenter, incompatible_keys: object = None) -> None:
    """Recompute the positional encoding after the random matrix behind it was loaded."""
    matrix = segmenter.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    if matrix.dtype == torch.float32 and not matrix.is_meta:
        segmenter.dense_pe.copy_(segmenter.sam.prompt_encoder.get_dense_pe())
