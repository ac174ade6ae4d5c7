"""scripts/bench_gpu.py where there is no GPU, and what it would write where there is one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from scripts import bench_gpu
from scripts.bench_gpu import STAGES, cases, main, table, write

ROW = {"stage": "sft", "attention": "sdpa", "sam_image_size": 224, "gpus": 2}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(document, JSON) of the command, below a temporary folder; the document is a copy of the shipped one."""
    document, result = tmp_path / "benchmarks.md", tmp_path / "bench/gpu.json"
    document.write_text(bench_gpu.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(bench_gpu, "DOCUMENT", document)
    monkeypatch.setattr(bench_gpu, "RESULT", result)
    return document, result


def test_without_a_gpu_it_says_so_and_writes_nothing(
    elsewhere: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = elsewhere[0].read_bytes()
    assert main([]) == 1
    printed = capsys.readouterr()
    assert "no CUDA GPU on this machine: nothing is measured and nothing written" in printed.err and not printed.out
    assert elsewhere[0].read_bytes() == before and not elsewhere[1].exists()


def test_every_case_is_a_valid_run(tmp_path: Path) -> None:
    options = argparse.Namespace(
        tiny=False, stages=list(STAGES), attention=["sdpa", "eager"], sam_sizes=[224, 1024], gpus=2, steps=4
    )
    planned = list(cases(options))
    assert {case.stage for case in planned} == set(STAGES)
    assert {(c.attention, c.sam_image_size) for c in planned if c.stage == "sft"} == {
        ("sdpa", 224), ("eager", 224), ("sdpa", 1024),
    }  # fmt: skip
    for case in planned:
        config = case.config(tmp_path)
        assert (config.stage, config.model.attention) == (case.stage, case.attention)
        assert config.model.sam_image_size == case.sam_image_size and config.engine.precision == "bf16"
        assert case.config(tmp_path).output_dir == str(tmp_path)


def test_the_table_stands_beside_the_plan(elsewhere: tuple[Path, Path]) -> None:
    """Made-up numbers, in a temporary document."""
    rows = [
        {**ROW, "clips_per_second": 0.5, "peak_bytes": 40_000_000_000, "planned_bytes": 36_000_000_000},
        {**ROW, "clips_per_second": 0.5, "peak_bytes": 50_000_000_000, "planned_bytes": 37_000_000_000},
        {**ROW, "error": "CUDA out of memory"},
    ]
    lines = table(rows).splitlines()
    assert lines[2:] == [
        "| sft | sdpa | 224 | 2 | 0.500 | 40.00 | 36.00 | -10 % |",
        "| sft | sdpa | 224 | 2 | 0.500 | 50.00 | 37.00 | -26 % (over 15 %) |",
        "| sft | sdpa | 224 | 2 | CUDA out of memory | | | |",
    ]
    document, result = elsewhere
    for host in ("first", "second"):  # a later measurement takes the place of the earlier one
        write(rows, {"host": host, "gpu": "2 x A40"})
    text = document.read_text(encoding="utf-8")
    assert "Measured on host second, gpu 2 x A40." in text and "host first" not in text
    assert "Nothing has been measured" not in text and text.count(lines[2]) == 1 and "## Planned" in text
    assert json.loads(result.read_text())["machine"]["host"] == "second"


def test_shipped_document_holds_no_figure_before_the_command_has_run() -> None:
    text = bench_gpu.DOCUMENT.read_text(encoding="utf-8")
    measured = text.split(bench_gpu.MARKS[0])[1].split(bench_gpu.MARKS[1])[0]
    assert ("Nothing has been measured" in measured) != ("Measured on host" in measured)
