"""train_ds.py itself: killed in mid-run and started again, losses and weights equal an undisturbed run to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.tiny_run import ROOT, command, environment, make_tiny_run, metrics, train

STEPS = 14
SETTINGS = (f"optim.steps={STEPS}", "log.save_every=4", "engine.micro_batch=2", "data.num_workers=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a tiny teacher run that has been trained (its folder is `run` beside it)."""
    config = make_tiny_run(tmp_path_factory.mktemp("tiny"))
    done = train(config, "optim.steps=2", "log.tensorboard=true", "log.samples_every=2", "eval.max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    return config


def student(tiny: Path) -> tuple[str, ...]:
    """Overrides that turn the tiny run into stage sft with distillation from the trained teacher."""
    return (
        *("stage=sft", "data.answer=reasoning", f"data.cot=[{tiny.parent}/cot.jsonl]", "loss.distill=1"),
        *(f"sft.teacher_checkpoint={tiny.parent}/run", "trainable.mask_decoder=false", *SETTINGS),
    )


def kill_at(config: Path, folder: Path, rows: int, *overrides: str, processes: int = 1) -> None:
    """Start a run and kill all its processes at once when `rows` rows of metrics are there."""
    with (folder.parent / "killed.log").open("w") as output:
        process = subprocess.Popen(
            command(config, *overrides, f"output_dir={folder}", processes=processes),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
        )
        path, end = folder / "metrics.jsonl", time.monotonic() + 600
        while not path.exists() or path.read_text().count("\n") < rows:
            assert process.poll() is None and time.monotonic() < end, (folder.parent / "killed.log").read_text()
            time.sleep(0.005)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            os.kill(victim.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_equals_undisturbed_run(tiny: Path, tmp_path: Path, processes: int) -> None:
    overrides = student(tiny)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train(tiny, *overrides, f"output_dir={whole}", processes=processes)
    assert done.returncode == 0, done.stderr
    kill_at(tiny, killed, 6, *overrides, processes=processes)
    assert not (killed / "final").exists() and metrics(killed)[-1]["step"] < STEPS
    done = train(tiny, *overrides, f"output_dir={killed}", processes=processes)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stderr
    assert [row["step"] for row in metrics(killed)] == list(range(1, STEPS + 1))
    assert metrics(killed) == metrics(whole)
    ours, theirs = (load_file(run / "final" / "trained.safetensors") for run in (killed, whole))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_what_a_run_leaves(tiny: Path) -> None:
    run = tiny.parent / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    names = {"loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "lr", "grad_norm", "seconds_per_step"}
    assert names <= rows[0].keys()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and samples[0].keys() == {"step", "row", "uid", "reference", "answer", "has_seg"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/ce_loss")] == [1, 2]
    assert board.Scalars("train/loss")[1].value == pytest.approx(rows[1]["loss"])
    for folder in (run, run / "final", run / "checkpoints" / "step_000002"):
        assert (folder / "config.yaml").read_text().startswith("# code: git ")
    assert (run / "final" / "trained.safetensors").exists()


def test_finished_changed_fresh(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(tiny, "optim.steps=2", f"output_dir={run}").returncode == 0
    changed = train(tiny, "optim.steps=2", "optim.lr=5e-4", f"output_dir={run}")
    assert changed.returncode == 1 and "optim.lr: 0.001 -> 0.0005" in changed.stderr
    assert "Remedy" in changed.stderr and "Traceback" not in changed.stderr
    longer = train(tiny, "optim.steps=3", "log.keep=1", f"output_dir={run}")
    assert longer.returncode == 0 and [row["step"] for row in metrics(run)] == [1, 2, 3]
    fresh = train(tiny, "optim.steps=2", "optim.lr=5e-4", f"output_dir={run}", "--fresh")
    assert fresh.returncode == 0 and [row["step"] for row in metrics(run)] == [1, 2]
    assert len(metrics(tmp_path / "run.previous-1")) == 3


def test_non_finite_loss_names_the_samples(tiny: Path, tmp_path: Path) -> None:
    done = train(tiny, "optim.lr=1e30", "optim.clip_norm=0", f"output_dir={tmp_path}/run")
    assert done.returncode == 1, done.stderr
    assert "error: optimiser step" in done.stderr and "(row " in done.stderr and "Remedy" in done.stderr


def test_broken_data_in_a_worker_names_the_sample(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.parent / "data", data)
    for clip in (data / "media").iterdir():
        (clip / "audio.wav").write_bytes(b"")
    done = train(tiny, f"data.root={data}", "data.num_workers=1", f"output_dir={tmp_path}/run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: sample " in done.stderr and "audio.wav" in done.stderr and "Remedy" in done.stderr


def test_other_settings_run(tiny: Path, tmp_path: Path) -> None:
    """bf16, ZeRO-3, gradient checkpointing, the lean trainable set and features computed anew, in two processes."""
    done = train(
        tiny,
        *("engine.precision=bf16", "engine.zero_stage=3", "engine.gradient_checkpointing=true", "optim.steps=2"),
        *("trainable.full=[]", "trainable.seg_rows_only=true", "data.feature_cache=none", f"output_dir={tmp_path}/run"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    names = load_file(tmp_path / "run" / "final" / "trained.safetensors")
    assert any("seg_row" in name for name in names) and all(value.numel() for value in names.values())
