"""The gradient that DeepSpeed applies is the plain sum over micro-batches, at every ZeRO stage, offloaded or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.accumulation_case import compare, with_small_buckets
from tests.tiny_run import launched, run
from utils import distributed, engine

ONE = [f"{zero}:{offload}:{accumulation}:answers" for zero in range(4) for offload in range(2 if zero else 1)
       for accumulation in (1, 4)]  # fmt: skip
GROUPS = ["2:1:4:group", "3:1:4:group"]
TWO = ["2:1:4:answers", "3:1:4:answers"]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process, and buckets smaller than lm_head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        patch.setattr(engine, "deepspeed_config", with_small_buckets(engine.deepspeed_config))
        distributed.start(threads=1)
        yield
        distributed.stop()


@pytest.mark.parametrize("case", [*ONE, *GROUPS])
def test_applied_gradient_is_the_plain_sum(case: str, alone: None) -> None:
    apart = {part: error for part, (error, _) in compare(case).items()}
    assert len(apart) == 5 and max(apart.values()) < 1e-3, apart


@pytest.mark.parametrize("engine_case", ["2:0", "2:1", "3:1"])
def test_bf16_gradients_are_summed_in_float32_where_that_is_asked_for(engine_case: str, alone: None) -> None:
    exact, rounded = (compare(f"{engine_case}:4:answers:{kind}") for kind in ("fp32", "weights"))
    assert max(error for error, _ in exact.values()) < 1e-5, exact
    assert min(error for error, _ in rounded.values()) > 1e-3, rounded


def test_applied_gradient_of_two_processes_is_the_plain_sum() -> None:
    done = run(launched("-m", "tests.accumulation_case", *TWO, processes=2))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])  # torch 2.9 writes of its connections before
    assert list(found) == TWO
    apart = {f"{case} {part}": error for case, parts in found.items() for part, (error, _) in parts.items()}
    assert len(apart) == 5 * len(TWO) and max(apart.values()) < 1e-3, apart
