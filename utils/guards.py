"""What stops a run early rather than letting it end quietly wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from utils.errors import NonFiniteError
from utils.types import Batch, StepLoss


def check_finite(loss: StepLoss, step: int, batch: Batch) -> None:
    """Stop on the loss of a micro-batch that is NaN or infinite; `step` counts from 1.

    Raises:
        NonFiniteError: with the step, the samples and the parts of the loss.
    """
    if not bool(loss.total.isfinite()):
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in loss.parts.items())
        samples = _named((sample.uid, sample.row) for sample in batch.samples)
        raise NonFiniteError(
            f"optimiser step {step}: the loss is {float(loss.total)} ({parts}) on {samples}. Remedy: look at these "
            "samples, lower optim.lr, or set engine.precision to fp32; the last checkpoint is intact."
        )


def check_norm(norm: float, step: int, samples: Iterable[tuple[str, int]]) -> None:
    """Stop on the gradient norm of step `step` (from 1) that is NaN or infinite.

    Raises:
        NonFiniteError: with the step and the (uid, row) of what this process trained on in it.
    """
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"optimiser step {step}: the gradient norm is {norm}; this process trained on {_named(samples)}. Remedy: "
            "lower optim.lr, or set engine.precision to fp32; the last checkpoint is intact."
        )


def _named(samples: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{uid} (row {row})" for uid, row in samples)


def check_logits(logits: Tensor) -> None:
    """Stop on logits that are NaN or infinite: argmax would turn them into a stream of token 0, which is "!".

    Users of VideoLLaMA2 meet this with float16 (issue 176 of its repository), in which the activations of the last
    layer overflow (issue 178); its loader takes float16 by default.

    Raises:
        NonFiniteError: naming the type, with the remedy.
    """
    if bool(logits.isfinite().all()):
        return
    kind = str(logits.dtype).removeprefix("torch.")
    if logits.dtype == torch.float16:
        cause, remedy = "the activations of a 7B model overflow in float16", "load the weights in bf16"
    else:
        cause, remedy = "a weight or an input is not finite", "run scripts/check_weights.py on the weights"
    raise NonFiniteError(
        f"the logits hold NaN or infinity (type {kind}): {cause}. Remedy: {remedy} (engine.precision: bf16, or "
        "dtype=torch.bfloat16 in from_pretrained)."
    )
