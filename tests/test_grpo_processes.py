"""Stage 3 in two processes: degenerate rollouts at ZeRO 2 and 3 end in no NaN and keep nobody waiting."""

from __future__ import annotations

import json
import math

import pytest

from tests.grpo_cases import CASES
from tests.tiny_run import launched, run


@pytest.fixture(scope="module")
def two_processes() -> dict[str, dict[str, dict]]:
    """ZeRO stage -> degenerate case -> what became of it, from one start of two processes."""
    done = run(launched("-m", "tests.grpo_cases", "2", "3", processes=2))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("zero_stage", ["2", "3"])
def test_degenerate_cases_in_two_processes(zero_stage: str, two_processes: dict[str, dict[str, dict]]) -> None:
    """Finite losses, equal weights afterwards and no process that waits for ever."""
    found = two_processes[zero_stage]
    assert found.keys() == CASES.keys()
    for name, result in found.items():
        assert result["same"] and result["finite"], name
        for losses in result["losses"]:
            assert len(losses) == CASES[name].get("updates_per_batch", 1)
            assert all(math.isfinite(x) for step in losses for x in step.values()), name
    mine, other = (losses[0] for losses in found["one process ends early"]["losses"])
    assert mine["completion_length"] == 1 and other["completion_length"] > 3
    for losses in found["equal rewards"]["losses"]:
        assert all(step["zero_variance_share"] == 1 and step["policy_loss"] == 0 for step in losses)
    for losses in found["all cut off"]["losses"]:
        assert all(step["truncated_share"] == 1 and step["policy_loss"] == 0 for step in losses)
    for losses in found["no seg at all"]["losses"]:
        assert all(step["mask_loss"] == 0 for step in losses)
    mine, other = (losses[0]["mask_loss"] for losses in found["seg in one process"]["losses"])
    assert mine == 0 and other > 0


def test_zero_2_and_3_agree(two_processes: dict[str, dict[str, dict]]) -> None:
    """The same losses, case by case, through steps with whole and with partitioned weights."""
    for name in CASES:
        whole, parted = (two_processes[zero_stage][name]["losses"] for zero_stage in ("2", "3"))
        for ours, theirs in zip(whole, parted, strict=True):
            for step, other in zip(ours, theirs, strict=True):
                assert step == pytest.approx(other, rel=1e-3, abs=1e-4), name
