"""Run by tests/test_memory_plan.py in processes of their own: python tests/memory_case.py. Optimiser steps at ZeRO 0 to
3; the main process prints the bytes that DeepSpeed holds, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.engine_cases import config
from utils import distributed
from utils.engine import build_engine
from utils.errors import leave

SIZES = ((47, 39), (39, 31), (31, 63), (63, 7))
"""Layers without bias: no equal share ends between two of them, and each is odd, so that ZeRO-3 pads it."""
CASES = ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in SIZES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(zero: int, precision: str) -> dict[str, int]:
    """What one process of an engine keeps between steps, and its gradients before the second one."""
    settings = config(zero, precision)
    settings = settings.model_copy(update={"optim": settings.optim.model_copy(update={"group_lr_scale": {}})})
    model = Stack()
    engine = build_engine(model, settings)
    optimizer: Any = engine.optimizer
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for _ in range(3):
        engine.backward(engine(torch.randn(2, SIZES[0][0]).to(dtype)).float().square().mean())
        engine.step()
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [x for state in inner.state.values() for x in state.values() if torch.is_tensor(x) and x.numel() > 1]
    own = {id(parameter) for parameter in model.parameters()}
    masters = [p for group in inner.param_groups for p in group["params"] if id(p) not in own]
    gradients: list[Tensor] = []
    if zero == 2:
        gradients = [x for group in optimizer.all_grad_tensors.values() if group for x in group]
    elif zero == 3:
        masters, gradients = optimizer.fp32_partitioned_groups_flat, [optimizer.grad_partitions_flat_buffer]
    bucket = getattr(optimizer, "reduce_bucket_size", 0)
    found = {"optimiser": held([*states, *masters]), "gradients": held(gradients), "bucket": int(bucket)}
    engine.destroy()
    return found


def main() -> None:
    distributed.start(threads=1)
    mine = {f"{zero} {precision}": measure(zero, precision) for zero, precision in CASES}
    gathered: list[dict] = [mine]
    if distributed.world_size() > 1:
        gathered = [{}] * distributed.world_size()
        torch.distributed.all_gather_object(gathered, mine)
    if distributed.is_main():
        print(json.dumps({case: {k: max(r[case][k] for r in gathered) for k in mine[case]} for case in mine}))
    distributed.stop()
    leave(0)  # as a command ends: gloo's threads may abort the interpreter's own end


if __name__ == "__main__":
    main()
