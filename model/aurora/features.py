"""Features of frozen towers, kept by clip so that a tower runs once per clip and not once per epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.tensor_files import TensorFileError, load_safetensors, write_safetensors

MODES = ("none", "memory", "disk")
IMAGES = "image_encoder"
"""Name under which the segmenter's image embeddings are kept; those of other towers have the module's."""


class FeatureCache:
    """Tower outputs by (tower, clip key), in CPU memory and in the type in which they were computed.

    Only right for towers without trainable parameters, which `AuroraModel.encode` checks, and for media without
    augmentation: a key must name the exact tensor that the tower reads (`Sample.video_key`, `Sample.audio_key`).

    Args:
        mode: "none" computes every time; "memory" keeps everything that was computed; "disk" keeps it in files, for
            later epochs, stages and runs (data.feature_cache).
        folder: of mode "disk".
        fingerprint: tower name -> what its outputs depend on besides the input (`tower_fingerprint`); features of
            other weights lie in other folders.

    Raises:
        ValueError: for another mode, or "disk" without folder and fingerprint.
    """

    def __init__(
        self, mode: str = "none", folder: Path | None = None, fingerprint: Callable[[str], str] | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"feature cache mode is {mode!r}; must be one of {MODES}")
        if mode == "disk" and (folder is None or fingerprint is None):
            raise ValueError("feature cache mode is 'disk': a folder and a fingerprint are needed")
        self.mode, self._folder, self._fingerprint = mode, folder, fingerprint
        self._folders: dict[str, Path] = {}
        self._stored: dict[tuple[str, str], Tensor] = {}

    def fetch(
        self,
        tower: str,
        keys: Sequence[str],
        run: Callable[[Tensor], Tensor],
        inputs: Tensor,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Features of the B rows that `keys` name, [B,...] on `device`; kept ones bit for bit.

        Args:
            tower: name of the tower.
            keys: B clip keys; equal keys share one entry.
            run: the tower, given rows of `inputs` on `device`.
            inputs: [B,...] on any device. Files are named by their digest, so that a clip whose media changed is never
                served its old features.
        """

        def compute(rows: slice) -> Tensor:
            # A slice, as a list of rows would copy pinned memory; cast by `run` on the device, for the same reason.
            return run(inputs[rows].to(device, non_blocking=True))

        if self.mode == "none":
            return compute(slice(None))
        kept: dict[str, Tensor] = {}
        for row, key in enumerate(keys):
            if key in kept:
                continue
            path = self._path(tower, key, inputs[row]) if self.mode == "disk" else None
            kept[key] = self._stored.get((tower, key)) if path is None else _read(path)
            if kept[key] is None:
                # One by one: the last bits of a batched result depend on what else is in the batch, and a resumed run,
                # whose memory is empty, meets its clips in other company.
                # A copy, or the entry would hold the memory of the whole result.
                kept[key] = compute(slice(row, row + 1))[0].detach().to("cpu", copy=True).contiguous()
                if path is None:
                    self._stored[tower, key] = kept[key]
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_safetensors(path, {"features": kept[key]})  # several processes may meet the same clip
        return torch.stack([kept[key] for key in keys]).to(device)

    def _path(self, tower: str, key: str, inputs: Tensor) -> Path:
        if tower not in self._folders:
            self._folders[tower] = self._folder / f"{tower}-{self._fingerprint(tower)}"
        digest = hashlib.sha256(inputs.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        return self._folders[tower] / f"{key}-{digest}.safetensors"


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        return load_safetensors(path)["features"]
    except TensorFileError as error:
        raise TensorFileError(f"{error}. Remedy: delete it; features that are not kept are made again.") from error


def tower_fingerprint(model: nn.Module, tower: str) -> str:
    """16 hex digits that change with any weight between a tower's input and the kept feature, and with their type."""
    before = {IMAGES: tuple(f"segmenter.{name}" for name in model.segmenter.encoders)}
    for t in model.backbone.towers:
        before[t.tower] = (f"backbone.{t.tower}",)
        before[t.projector] = (f"backbone.{t.tower}", f"backbone.{t.projector}")
    digest = hashlib.sha256()
    for name in before[tower]:
        for key, value in sorted(model.get_submodule(name).state_dict().items()):
            digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
