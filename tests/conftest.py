"""Paths and arrays of the parity fixture; one torch thread, so that sums keep their order; failures told at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.weights import load_backbone

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "videollama2_av_tiny"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says what failed when it fails: whoever ends a long run early would not see pytest's summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        reason = report.longreprtext.strip().splitlines()[-12:]
        print("", f"{report.when} of {report.nodeid} failed:", *reason, sep="\n", flush=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """A command of ours sets its logger up in this process; later tests that read the log must not notice."""
    logger = logging.getLogger("aurora")
    before = logger.propagate, logger.level, list(logger.handlers)
    yield
    logger.propagate, logger.level, logger.handlers = before[0], before[1], before[2]


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind != "U"}


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A checkpoint folder in the released layout: random weights, a few hundred thousand values."""
    return TINY


@pytest.fixture(scope="session")
def tiny_inputs() -> dict[str, Tensor]:
    arrays = _arrays(TINY / "inputs.npz")
    arrays["pixels"] = (arrays["pixel_values_u8"].float() / 255 - 0.5) / 0.5
    return arrays


@pytest.fixture(scope="session")
def tiny_expected() -> dict[str, Tensor]:
    return _arrays(TINY / "expected.npz")


@pytest.fixture(scope="session", params=["eager", "sdpa"])
def tiny_backbone(request: pytest.FixtureRequest) -> VideoLlama2:
    """Loaded through the public path; shared by the session, so tests must leave its weights as they are."""
    return load_backbone(TINY, attention=request.param)[0]
