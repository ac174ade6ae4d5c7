"""Checkpoints: bit-equal at every ZeRO stage, pruned, verified, never half-written."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from tests.engine_cases import COMBINATIONS
from tests.test_engine import run_case
from utils import log
from utils.checkpoint import claim, put_aside
from utils.errors import CheckpointError
from utils.files import write_text


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_bit_equal(processes: int, tmp_path: Path) -> None:
    found = run_case("resume_all", str(tmp_path), processes=processes)
    assert found == {f"{zero} {precision}": True for zero, precision in COMBINATIONS}


def test_kept_skipped_refused(tmp_path: Path) -> None:
    found = run_case("keep_and_damage", str(tmp_path))
    assert found["kept"] == ["latest", "step_000002", "step_000003"] and found["latest"] == "step_000003"
    for damage in ("after a flipped bit", "after a cut", "beside an unfinished one"):
        assert found[damage] == "step_000002"
    assert "the optimiser states of process 1 are missing. Remedy" in found["other world"]
    assert "body.weight" in found["other parameters"] and "Remedy" in found["other parameters"]
    assert found["all damaged"] is None
    assert "all 2 checkpoints are damaged" in found["refused"] and "--fresh" in found["refused"]


def test_best_is_kept_and_a_full_disk_harms_nothing(tmp_path: Path) -> None:
    found = run_case("best_and_full", str(tmp_path))
    assert found["kept"] == ["best", "latest", "step_000002", "step_000004"] and found["best"] == "step_000002"
    assert "step_000005: could not be written (process 0:" in found["full"] and "Remedy: free space" in found["full"]
    assert found["after"] == found["kept"] and found["newest"] == "step_000004"


def test_saving_writes_and_reads_once_and_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    found = run_case("saving", str(tmp_path))
    assert found["written"] == pytest.approx(1.0, abs=0.02) == found["read"], found
    assert found["half a file"] == found["manifest"] == "step_000001"
    assert found["light weights"] == "step_000004"  # complete but for them
    assert found["left"] == ["latest", "step_000001", "step_000004"]
    assert found["latest"] == "step_000005" and found["at last"] == ["latest", "step_000005"]


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """2 -> 1 processes with the same samples per step: the weights of an undisturbed run but for rounding."""
    run_case("elastic", str(tmp_path / "moved"), "0", "2", processes=2)
    found = run_case("elastic_both", str(tmp_path))
    assert found["moved"].keys() == found["straight"].keys()
    for name, expected in found["straight"].items():
        assert found["moved"][name]["weights"] == pytest.approx(expected["weights"], abs=1e-6), name
        assert found["moved"][name]["rates"] == expected["rates"]


def test_metrics_are_cut_at_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n3\n{"loss": 1}\n{"step": 2}\n\xff\x00\n{"step": 3}\n{"st')
    log._keep_rows(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_one_writer_per_folder(tmp_path: Path) -> None:
    held = claim(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is writing there. Remedy: wait"):
        claim(tmp_path / "run", patience=0.1)
    fcntl.flock(held, fcntl.LOCK_UN)
    claim(tmp_path / "run").close()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "run", Path("/proc/aurora/run")):
        with pytest.raises(CheckpointError, match="output_dir = .*not writable.*Remedy"):
            claim(output)


def test_put_aside_counts(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        put_aside(tmp_path / "run")
        assert (tmp_path / f"run.previous-{number}").is_dir()
    put_aside(tmp_path / "run")
    assert not (tmp_path / "run.previous-3").exists()


def test_write_text_leaves_nothing_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "one")
    write_text(tmp_path / "x", "two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "two")]
