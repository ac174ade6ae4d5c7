"""The one place that imports DeepSpeed, so that it starts quietly and without compiling anything."""

from __future__ import annotations

import logging
import os

import torch

if not torch.cuda.is_available():
    # Otherwise DeepSpeed searches for accelerators, and torch's extension builder for CUDA, both with warnings.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402 - the variable above is read at import

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

# The shared-memory all-reduce serves tensor-parallel inference alone, but DeepSpeed would compile it at the first start
# on a CPU: half a minute, and a failure where no C++ compiler is installed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed"]
