"""The same modules with other values for their trained tensors: the teacher of eq. 2, the reference policy of eq. 5.

Such a model shares base, SAM and the choice of trained parameters with the one that is trained, so those tensors are
all that differs: megabytes with adapters, instead of a second model of 7 G values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.aurora.features import FeatureCache
from model.aurora.model import AuroraModel, evaluating
from utils.errors import ConfigError, Problem

Result = TypeVar("Result")


class SwappedWeights:
    """A model with other values, for as long as a function runs on it.

    Args:
        model: whose modules are used; its own values stay as they are.
        tensors: parameter name -> other values; None = the trained parameters as they are now.

    Raises:
        ConfigError: the parameters are partitioned (ZeRO-3), so that nothing can take their places.
    """

    def __init__(self, model: AuroraModel, tensors: Mapping[str, Tensor] | None = None) -> None:
        parameters = dict(model.named_parameters())
        if any(hasattr(p, "ds_id") for p in parameters.values()):
            rule = "a teacher or a reference policy needs whole parameters to take the places of"
            remedy = "set it to 2 or less, or loss.distill and grpo.beta to 0"
            raise ConfigError([Problem("engine.zero_stage", 3, rule, remedy)])
        if tensors is None:
            tensors = {name: p for name, p in parameters.items() if p.requires_grad}
        copies = {n: x.detach().to(parameters[n].device, parameters[n].dtype, copy=True) for n, x in tensors.items()}
        towers = tuple(f"backbone.{name}." for t in model.backbone.towers for name in (t.tower, t.projector))
        self.shares_towers = not any(
            parameters[name].requires_grad or not torch.equal(parameters[name], copies[name])
            for name in copies
            if name.startswith(towers)
        )
        """Whether video and sound as the model encodes them hold for the other values too, and always will."""
        self._tensors = {f"model.{name}": x for name, x in copies.items()}
        self._call = _Call(model)

    @torch.no_grad()
    def __call__(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(model, *arguments)` under the other values, in eval mode and without gradient."""
        model = self._call.model
        kept = model.feature_cache
        if not self.shares_towers:
            model.feature_cache = FeatureCache()  # what the model keeps are features of its own towers
        try:
            with evaluating(model):
                return functional_call(self._call, self._tensors, (function, *arguments))
        finally:
            model.feature_cache = kept


class _Call(nn.Module):
    """Any function of a model as a module call, which is what torch can exchange tensors for."""

    def __init__(self, model: AuroraModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(self.model, *arguments)
