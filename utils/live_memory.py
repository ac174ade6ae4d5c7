"""Bytes of tensors that are alive while code runs, counted on torch's meta device: the memory of a step without a GPU.

Every operation passes through a dispatch mode that counts new storages and hears of their end, so the peak is that of
the code itself (saved activations, recomputation, temporaries of each operator), at the real shapes. Not counted: the
workspaces of GPU kernels, rounding and fragmentation of the allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        known: tensors that exist already and are not counted (parameters, buffers).
        vocabulary: last dimension of logits, which are counted apart as well; None = none.
    """

    def __init__(self, known: Iterable[Tensor] = (), vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now = self.logits_now = 0
        self.peak = 0
        """Most bytes alive at once since entering."""
        self.logits_at_peak = 0
        """Bytes of logits, their copies and gradients at that moment."""
        self.logits_peak = 0
        """Most bytes of logits alive at once, at whatever moment."""
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        logits = size if tensor.dim() and tensor.shape[-1] == self.vocabulary else 0
        self._alive[key] = (size, logits)
        weakref.finalize(storage, self._end, key)
        self.now += size
        self.logits_now += logits
        self.logits_peak = max(self.logits_peak, self.logits_now)
        if self.now > self.peak:
            self.peak, self.logits_at_peak = self.now, self.logits_now

    def _end(self, key: int) -> None:
        size, logits = self._alive.pop(key)
        self.now -= size
        self.logits_now -= logits


@contextmanager
def fused_attention() -> Iterator[None]:
    """Puts the memory of a fused kernel in the place of `torch.nn.functional.scaled_dot_product_attention`.

    On the meta device torch takes the plain formula, which holds all scores. The flash and memory-efficient kernels
    hold queries, keys, values, output and one float32 per query; their backward writes three gradients. (The function
    itself is exchanged for the length of the `with`: modes of torch do not reach recomputation in backward.)
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Fused(torch.autograd.Function):
    """Shapes of a fused attention: [B,H,S,d] queries, [B,H',S',d] keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # As the kernels lay it out: position before head, so that the caller's transpose back copies nothing.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def gradients_dropped(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Forget each parameter's gradient as soon as it is whole, as ZeRO does when it has moved it into its buffers."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(forget) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
