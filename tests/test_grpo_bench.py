"""scripts/dev/bench_grpo.py at the smallest size: both ways give the same, and every part is written down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.dev import bench_grpo


def test_both_ways_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, threads = tmp_path / "bench/grpo.json", torch.get_num_threads()
    sizes = "--layers 2 --width 64 --vocabulary 600 --new-tokens 6 --prompts 700 --groups 3".split()
    options = ["--threads", "1", "--repeats", "1", "--clock", "cpu", "--parts", "scoring", "sampling", "step"]
    monkeypatch.setattr(sys, "argv", ["bench_grpo.py", *sizes, *options, "--json", str(result)])
    bench_grpo.main()
    torch.set_num_threads(threads)
    (row,) = json.loads(result.read_text())
    assert row["loss_apart"] < 1e-5 and row["gradients_apart"] < 1e-5
    assert row["same_samples"] and row["step_loss_apart"] < 1e-5
    assert row["limit"] == pytest.approx(3 * 706 / (700 + 18))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1].split()[0] for line in lines] == ["scoring", "sampling", "step"]
    assert "limit 2.95x" in lines[0] and "wanted 1.4x" in lines[1] and "wanted 1.8x" in lines[2]


def test_a_case_too_small_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}  # fmt: skip
    with pytest.raises(ValueError, match="a prompt of 50 tokens"):
        bench_grpo.StepCase(tmp_path, sizes, 50, 3, 6)


def test_peak_memory_is_that_of_this_process() -> None:
    before = bench_grpo.peak_resident()
    held = torch.ones(64, 1024, 1024)
    assert bench_grpo.peak_resident() >= min(before, 64 * 4)
    assert held.numel() and bench_grpo.peak_resident() > 200
