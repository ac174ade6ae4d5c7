"""train_ds.py itself: killed or stopped in mid-run and started again, it equals an undisturbed run to the bit."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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


def disturb(
    config: Path, folder: Path, rows: int, act: Callable[[psutil.Process], None], *overrides: str, processes: int = 1
) -> tuple[int, str, float]:
    """Start a run and do something to it when `rows` rows of metrics are there.

    Returns:
        Exit status, all it printed, seconds from the act to its end.
    """
    log = folder.parent / "disturbed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(config, *overrides, f"output_dir={folder}", processes=processes),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
        )
        path, end = folder / "metrics.jsonl", time.monotonic() + 600
        while not path.exists() or path.read_text().count("\n") < rows:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.005)
        act(psutil.Process(process.pid))
        start = time.monotonic()
        status = process.wait(timeout=120)
    return status, log.read_text(), time.monotonic() - start


def train_on_two_nodes(config: Path, folder: Path, *overrides: str) -> None:
    """Two of DeepSpeed's launchers with a hostfile of two machines of one process each, both of which are this one."""
    hosts = folder / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hosts), "--no_ssh"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", port]
    variables = {**environment(), "DS_ACCELERATOR": "cpu"}
    nodes = []
    for number in range(2):
        line = [*launch, "--node_rank", str(number), *command(config, *overrides)[1:]]
        with (folder / f"node{number}.log").open("w") as log:
            nodes.append(subprocess.Popen(line, cwd=ROOT, env=variables, stdout=log, stderr=log))
    for number, node in enumerate(nodes):
        assert node.wait(timeout=600) == 0, (folder / f"node{number}.log").read_text()


def kill_all(process: psutil.Process) -> None:
    for victim in [*process.children(recursive=True), process]:
        victim.kill()


def kill_rank_1(launcher: psutil.Process) -> None:
    ranks = {child.environ()["RANK"]: child for child in launcher.children()}
    assert ranks.keys() == {"0", "1"}
    ranks["1"].kill()


def terminate_all(process: psutil.Process) -> None:
    """As a scheduler does: decoding processes too."""
    for each in [*process.children(recursive=True), process]:
        each.terminate()


def check_equal(ours: Path, theirs: Path) -> None:
    """Every step once, losses and weights to the bit."""
    assert [row["step"] for row in metrics(ours)] == list(range(1, STEPS + 1))
    assert metrics(ours) == metrics(theirs)
    mine, other = (load_file(run / "final" / "adapter_model.safetensors") for run in (ours, theirs))
    assert mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)


def test_killed_then_terminated_run_equals_undisturbed_run(tiny: Path, tmp_path: Path) -> None:
    overrides = student(tiny)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train(tiny, *overrides, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    status, _, _ = disturb(tiny, broken, 6, kill_all, *overrides)
    assert status == -9 and not (broken / "final").exists() and metrics(broken)[-1]["step"] < STEPS
    status, log, _ = disturb(tiny, broken, 10, terminate_all, *overrides)
    assert status == 0, log
    last = metrics(broken)[-1]["step"]
    assert "continuing at step" in log and "Traceback" not in log
    assert f"stopped by SIGTERM after step {last}" in log and last < STEPS and not (broken / "final").exists()
    assert (broken / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    done = train(tiny, *overrides, f"output_dir={broken}")
    assert done.returncode == 0 and f"continuing at step {last}" in done.stderr, done.stderr
    check_equal(broken, whole)


def test_a_killed_rank_takes_the_job_down_and_the_run_goes_on_as_on_two_nodes(tiny: Path, tmp_path: Path) -> None:
    overrides = student(tiny)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_on_two_nodes(tiny, tmp_path, *overrides, f"output_dir={whole}")
    status, log, seconds = disturb(tiny, broken, 6, kill_rank_1, *overrides, processes=2)
    assert status == 1 and seconds < 60
    assert "Signal 9 (SIGKILL) received by PID" in log, log
    done = train(tiny, *overrides, f"output_dir={broken}", processes=2)
    assert done.returncode == 0 and "continuing at step" in done.stderr, done.stderr
    check_equal(broken, whole)


def test_a_lost_decoding_process_is_named(tiny: Path, tmp_path: Path) -> None:
    def kill_worker(process: psutil.Process) -> None:
        for child in process.children():
            child.kill()

    status, log, seconds = disturb(tiny, tmp_path / "run", 2, kill_worker, "optim.steps=500", *SETTINGS[1:])
    assert status == 1 and seconds < 60 and "Traceback" not in log, log
    assert "error: a decoding process was lost" in log and "Remedy: lower data.num_workers" in log


@pytest.mark.smoke
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
    assert (run / "final" / "adapter_model.safetensors").exists()


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
    names = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any("trainable_tokens" in name for name in names) and all(value.numel() for value in names.values())
