"""Spatio-temporal convolution connector, type `stc_connector_v35` (VideoLLaMA2 model/projector.py:148-247).

Two RegNet stages around a strided 3-D convolution: stage 1 mixes patches of each frame, the sampler halves time, height
and width (padding 0: an odd last frame, row or column is dropped), stage 2 mixes again, and an MLP reads out tokens.
The released code takes its stages from timm; they are written here with the same parameter names.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.backbones.videollama2.config import VideoLlama2Config

DEPTH = 4
"""Bottlenecks per stage (projector.py: depth=4)."""

SQUEEZE_RATIO = 0.25
"""Squeeze-and-excitation width over the block's INPUT channels (timm's RegNet convention)."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B,C,h,w] (timm's LayerNormAct2d; checkpoints name it "bn"), eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, channel norm, optional SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1, activate: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = ChannelNorm(outputs, eps=1e-5)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.silu(x) if self.activate else x


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their spatial means."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, width, 1)
        self.fc2 = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Bottleneck(nn.Module):
    """RegNet-Y bottleneck of ratio 1: 1x1, depthwise 3x3, squeeze-excite, 1x1, shortcut, SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)
        self.se = SqueezeExcite(outputs, round(inputs * SQUEEZE_RATIO))
        self.conv3 = ConvNorm(outputs, outputs, activate=False)
        self.downsample = ConvNorm(inputs, outputs, activate=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class Stage(nn.Sequential):
    """`DEPTH` bottlenecks named b1, b2, ... as in timm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        for i in range(DEPTH):
            self.add_module(f"b{i + 1}", Bottleneck(inputs if i == 0 else outputs, outputs))


class STCConnector(nn.Module):
    """Patch features of a clip to video tokens of the language model's width."""

    def __init__(self, config: VideoLlama2Config) -> None:
        super().__init__()
        inputs, width = config.vision.hidden_size, config.language.hidden_size
        self.grid = config.vision.grid
        self.s1 = Stage(inputs, width)
        self.sampler = nn.Sequential(nn.Conv3d(width, width, kernel_size=2, stride=2), nn.SiLU())
        self.s2 = Stage(width, width)
        self.readout = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, patches: Tensor) -> Tensor:
        """Mix and shorten.

        Args:
            patches: [B,T,N,Dv], N = grid^2 row-major.

        Returns:
            [B,Mv,D] with Mv = (T // 2) * (grid // 2)^2, ordered (time, row, column).

        Raises:
            ValueError: for fewer than two frames or another patch grid.
        """
        if patches.ndim != 4 or patches.shape[2] != self.grid**2:
            raise ValueError(f"connector: patches of shape {tuple(patches.shape)}; [B, T, {self.grid**2}, D] is needed")
        if patches.shape[1] < 2:
            raise ValueError("connector: a clip needs at least 2 frames (time is halved); repeat a single image")
        batch, frames = patches.shape[:2]
        # A view: the channels are already the innermost dimension, so the whole stage runs in channels-last layout.
        x = patches.reshape(batch * frames, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        x = self.s1(x)
        x = self.sampler(x.unflatten(0, (batch, frames)).transpose(1, 2))
        x = self.s2(x.transpose(1, 2).flatten(0, 1))
        return self.readout(x.flatten(2).transpose(1, 2).reshape(batch, -1, x.shape[1]))
