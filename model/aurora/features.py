"""Features of frozen towers, kept by clip so that a tower runs once per clip and not once per epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MODES = ("none", "memory")


class FeatureCache:
    """Tower outputs by (tower, clip key), in CPU memory and in the type in which they were computed.

    Only right for towers without trainable parameters, which `AuroraModel.encode` checks, and for media without
    augmentation: a key must name the exact tensor that the tower reads (`Sample.video_key`, `Sample.audio_key`).

    Args:
        mode: "none" computes every time; "memory" keeps everything that was computed (data.feature_cache).

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: str = "none") -> None:
        if mode not in MODES:
            raise ValueError(f"feature cache mode is {mode!r}; must be one of {MODES}")
        self.mode = mode
        self._stored: dict[tuple[str, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in self._stored.values())

    def fetch(self, tower: str, keys: Sequence[str], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Features of the B rows that `keys` name.

        In mode "memory" new clips are computed one by one: the last bits of a batched result depend on what else is in
        the batch, and a resumed run, whose memory is empty, meets its clips in other company.

        Args:
            tower: name of the tower.
            keys: B clip keys; equal keys share one entry.
            compute: given row indices [R] of the batch, their features [R,...] on the compute device.

        Returns:
            [B,...] on the device of `compute`'s result, or on the CPU if nothing was new; from the memory bit for bit.
        """
        if self.mode == "none":
            return compute(list(range(len(keys))))
        device = torch.device("cpu")
        for row, key in enumerate(keys):
            if (tower, key) not in self._stored:
                features = compute([row])[0].detach()
                device = features.device
                # A copy, or the entry would hold the memory of the whole result.
                self._stored[tower, key] = features.to("cpu", copy=True)
        return torch.stack([self._stored[tower, key] for key in keys]).to(device)
