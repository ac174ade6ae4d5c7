"""The one place that imports DeepSpeed, so that it starts quietly and without compiling anything."""

from __future__ import annotations

import importlib
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



def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimiser, which nothing here uses, without the compiler that decorates it.

    The engine asks of every optimiser whether it is Muon, and that import loads torch's inductor: 6 of the 13 seconds
    of processor time that a small run took.
    """
    compiles = torch.compile
    torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ModuleNotFoundError:  # another version of DeepSpeed
        pass
    finally:
        torch.compile = compiles


_import_muon_uncompiled()

__all__ = ["deepspeed"]
