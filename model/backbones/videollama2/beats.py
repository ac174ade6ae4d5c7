"""BEATs encoder (iter3+), from https://github.com/microsoft/unilm/tree/master/beats as VideoLLaMA2 carries it.

Post-norm transformer with deep-norm residuals, a weight-normalised positional convolution, and a T5-style relative
position bias that each layer gates by its queries. Differences from the released code, none of which changes a value:
the position table is one parameter (released: one module registered under every layer), the fp16 safeguards around
the softmax are left out, and dropout and layerdrop do not exist (backbone.py:135-136 drops layers even when frozen).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.backbones.videollama2.config import BeatsConfig


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant (released code modules.py, GradMultiply)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each relative position (key minus query), T5's bidirectional scheme.

    Half of the buckets serve positive distances. Of each half, the first half is exact, the rest is logarithmic up to
    `max_distance`, beyond which all distances share the last bucket.

    Args:
        distance: int64, any shape.

    Returns:
        int64 of the same shape, in [0, num_buckets).
    """
    half = num_buckets // 2
    exact = half // 2
    size = distance.abs()
    # clamp: log(0) is never selected, but it must not produce a non-finite integer cast
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, coarse)


class WeightNormConv(nn.Module):
    """Positional convolution whose kernel is normalised per tap: w = g * v * rsqrt(sum v^2 + 1e-6).

    Plain parameters `weight_g`, `weight_v`, because torch's weight norm has no 1e-6 (weight_norm_fix.py:20-31). The
    last output of the even kernel is cut, so the length stays.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with std sqrt(4 / (kernel * width)), as BEATs starts."""
        width, _, kernel = self.weight_v.shape
        with torch.no_grad():
            nn.init.normal_(self.weight_v, std=math.sqrt(4 / (kernel * width)))
            self.weight_g.copy_(self.weight_v.square().sum((0, 1), keepdim=True).sqrt())
            nn.init.zeros_(self.bias)

    def weight(self) -> Tensor:
        """[D, D/groups, kernel] effective kernel, computed in float32 at least."""
        wide = torch.promote_types(self.weight_v.dtype, torch.float32)
        v = self.weight_v.to(wide)
        normed = self.weight_g.to(wide) * v * torch.rsqrt(v.square().sum((0, 1), keepdim=True) + 1e-6)
        return normed.to(self.weight_v.dtype)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight_v.shape[-1]
        out = F.conv1d(x, self.weight(), self.bias, padding=kernel // 2, groups=self.groups)
        return out[..., : x.shape[-1]]


class BeatsAttention(nn.Module):
    """Self-attention with a relative position bias gated per head and query."""

    def __init__(self, config: BeatsConfig, attention: str) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.head_dim = width // self.heads
        self.eager = attention == "eager"
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(self.head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """x [B,M,Da], position_bias [heads,M,M] (row = query) -> [B,M,Da]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The gate reads the queries before their scaling.
        update, reset = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        bias = (update * (reset * self.grep_a - 1) + 2) * position_bias
        if self.eager:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5 + bias
            out = scores.float().softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class BeatsLayer(nn.Module):
    """Post-norm layer with deep-norm residuals: x = LN(alpha * x + f(x))."""

    def __init__(self, config: BeatsConfig, attention: str) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25
        self.self_attn = BeatsAttention(config, attention)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, position_bias))
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))


class BeatsEncoder(nn.Module):
    """Positional convolution, then the layers over one shared relative-position table.

    Args:
        config: sizes.
        attention: "eager" writes the softmax out; "sdpa" uses torch's fused kernels.
    """

    def __init__(self, config: BeatsConfig, attention: str = "sdpa") -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.gradient_decay = config.layer_wise_gradient_decay_ratio
        self.gradient_checkpointing = False
        # A Sequential of one, because checkpoints name the convolution pos_conv.0.
        self.pos_conv = nn.Sequential(WeightNormConv(width, config.conv_pos, config.conv_pos_groups), nn.GELU())
        self.layer_norm = nn.LayerNorm(width)
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        self.layers = nn.ModuleList(BeatsLayer(config, attention) for _ in range(config.encoder_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BEATs' start: Xavier, the value path shrunk by (8 * layers)^(-1/4) as deep-norm asks; table normal 0.02."""
        shrink = (8 * len(self.layers)) ** -0.25
        nn.init.normal_(self.relative_attention_bias.weight, std=0.02)
        for layer in self.layers:
            attn = layer.self_attn
            for linear, gain in ((attn.q_proj, 1.0), (attn.k_proj, 1.0), (attn.v_proj, shrink),
                                 (attn.out_proj, shrink), (layer.fc1, shrink), (layer.fc2, shrink)):  # fmt: skip
                nn.init.xavier_normal_(linear.weight, gain=gain)
                nn.init.zeros_(linear.bias)

    def position_bias(self, length: int) -> Tensor:
        """[heads,M,M] ungated bias; entry [h,i,j] is the table at bucket(j - i)."""
        table = self.relative_attention_bias
        distance = torch.arange(1 - length, length, device=table.weight.device)
        by_distance = table(relative_buckets(distance, self.num_buckets, self.max_distance)).T
        # Row i of the bias is the window of `length` distances that starts at -i: windows in reverse order.
        return by_distance.unfold(1, length, 1).flip(1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,M,Da] patch embeddings -> [B,M,Da] features; every position is attended to (no padding mask)."""
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        bias = self.position_bias(x.shape[1])
        for layer in self.layers:
            if self.gradient_decay != 1.0 and x.requires_grad:
                x = _ScaleGradient.apply(x, self.gradient_decay)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, bias, use_reentrant=False)
            else:
                x = layer(x, bias)
        return x
