"""SAM's weight files: read safely, compared key by key, position tables resampled to another image size.

Pure functions on state dicts; `model.segmenters.sam` builds the module that they are for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from utils.errors import WeightsError
from utils.tensor_files import load_safetensors, load_state

POSITION_TABLE = "image_encoder.pos_embed"
RELATIVE_TABLE = "image_encoder.blocks.{}.attn.rel_pos_{}"


class Sizes(Protocol):
    """What is needed of `model.segmenters.sam.SamSizes`."""

    encoder_width: int
    encoder_depth: int
    global_blocks: tuple[int, ...]


def read_sam_file(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, read without running any code that it may hold.

    Raises:
        WeightsError: no such file, another ending, damaged, or holding more than tensors.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise WeightsError(f"model.sam_checkpoint = {path}: does not exist. Remedy: download it, or correct the path.")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix == ".pth":
        return load_state(path)
    raise WeightsError(f"model.sam_checkpoint = {path}: must end in .pth or .safetensors")


def sam_problems(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], sizes: Sizes) -> list[str]:
    """Every key that is missing, unexpected or of another shape; tables that can be resampled may differ in length."""
    tables = position_tables(sizes.global_blocks)
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key, value in expected.items():
        if key in state and not _fits(state[key], value, key in tables):
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")
    return problems


def refuse_sam(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    sizes: Sizes,
    known: Mapping[str, Sizes],
    checkpoint: str | Path,
) -> None:
    """Raise one WeightsError with all of `sam_problems`, headed by what the file seems to be.

    Args:
        state, expected, sizes: see `sam_problems`.
        known: sizes of the released SAMs by name.
        checkpoint: for the message.
    """
    problems = sam_problems(state, expected, sizes)
    if not problems:
        return
    kind = recognise(state, known)
    here = next((name for name, other in known.items() if other == sizes), "a SAM of its own sizes")
    guess = f"; the file holds {kind}, the model is {here}. Remedy: set model.sam_type: {kind}" if kind else ""
    listed = "\n  ".join(problems)
    raise WeightsError(f"{checkpoint} does not fit this SAM (check model.sam_type){guess}:\n  {listed}")


def recognise(state: Mapping[str, Tensor], known: Mapping[str, Sizes]) -> str | None:
    """Name of the released SAM whose encoder has the width and depth of `state`, None without one."""
    table = state.get(POSITION_TABLE)
    if table is None or table.dim() != 4:
        return None
    blocks = {m.group(1) for key in state if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", key))}
    found = (table.shape[-1], len(blocks))
    return next((name for name, s in known.items() if (s.encoder_width, s.encoder_depth) == found), None)


def position_tables(global_blocks: tuple[int, ...]) -> set[str]:
    """Names of the tables whose length follows from the image size."""
    return {POSITION_TABLE} | {RELATIVE_TABLE.format(block, axis) for block in global_blocks for axis in "hw"}


def resample_position_tables(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], global_blocks: tuple[int, ...]
) -> dict[str, Tensor]:
    """Bicubic resampling of a checkpoint's position tables to another image size, as in the released code.

    `pos_embed` [1,h,w,D] and the `rel_pos_h/w` [2h-1, D/heads] of the global blocks depend on the grid; the tables of
    windowed blocks depend on the window and are left as they are.
    """
    resampled = dict(state)
    for key in position_tables(global_blocks):
        if key in state and key in expected and state[key].shape != expected[key].shape:
            wanted = expected[key].shape
            absolute = key == POSITION_TABLE
            resampled[key] = (
                resample_grid(state[key], wanted[1:3]) if absolute else resample_relative(state[key], wanted[0])
            )
    return resampled


def resample_grid(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Absolute positions [1,h,w,D] on a grid of another size, bicubic."""
    channels_first = table.permute(0, 3, 1, 2).float()
    moved = F.interpolate(channels_first, tuple(size), mode="bicubic", align_corners=False)
    return moved.permute(0, 2, 3, 1).contiguous().to(table.dtype)


def resample_relative(table: Tensor, length: int) -> Tensor:
    """Relative positions [L,D] at another length: the table is treated as an image, D unchanged, bicubic."""
    image = table[None, None].float()
    return F.interpolate(image, (length, table.shape[1]), mode="bicubic", align_corners=False)[0, 0].to(table.dtype)


def _fits(stored: Tensor, wanted: Tensor, is_table: bool) -> bool:
    """Equal shapes; for a table that is resampled, equal rank and width."""
    if is_table:
        return stored.dim() == wanted.dim() and stored.shape[-1] == wanted.shape[-1]
    return stored.shape == wanted.shape
