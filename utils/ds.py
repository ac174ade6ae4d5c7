"""The one place that imports DeepSpeed, so that it starts quietly and without compiling anything."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    # Otherwise DeepSpeed searches for accelerators, and torch's extension builder for CUDA, both with warnings.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402 - the variable above is read at import

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

# DeepSpeed calls these two by the names that torch 2.14 deprecates; the project cannot change its calls.
warnings.filterwarnings(
    "ignore",
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    FutureWarning,
    r"torch\.distributed\.c10d_logger",
)


def _spare_shm_build() -> None:
    """Tell DeepSpeed not to build its shared-memory all-reduce, which serves tensor-parallel inference alone.

    It would compile it at the first start on a CPU: half a minute, and a failure without a C++ compiler. There is no
    setting for that, so this is the one place that touches a private name of another package. Where the name is gone,
    DeepSpeed builds again, and tests/test_public_names.py says so.
    """
    with contextlib.suppress(AttributeError):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_spare_shm_build()


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
