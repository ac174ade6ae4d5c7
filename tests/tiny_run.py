"""A complete training run at the smallest size: the parity fixture as base, a random small SAM, made-up clips."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from model.segmenters.sam import SamSizes, build_segmenter
from tests.conftest import TINY
from tests.data_builders import ROWS, write_lines, write_tokenizer, write_world

ROOT = Path(__file__).resolve().parent.parent
SAM_SIDE = 32


def make_tiny_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Base, SAM, four training clips and their reasoning below `folder`.

    Args:
        sections: put over the configuration, section by section.

    Returns:
        The YAML file of a teacher run in `folder/run`: 2 clips a step, no warm-up, one process of one thread.
    """
    base = folder / "base"
    base.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, base / name)
    write_tokenizer(base)
    sizes = SamSizes(24, 2, 2, (1,), patch_size=8, window_size=2, prompt_width=32, decoder_mlp=32, iou_head_width=32)
    sizes.to_json(base / "sam.json")
    torch.manual_seed(0)
    save_file(build_segmenter(str(base / "sam.json"), SAM_SIDE).sam.state_dict(), base / "sam.safetensors")
    rows = [row for row in ROWS if row[2] == "train"]
    write_world(folder / "data", rows, seconds=10.0)
    records = [
        {"row": i, "uid": row[1], "reasoning": f"There is {row[4].strip()} So the target is it.", "target": "it"}
        for i, row in enumerate(rows)
    ]
    write_lines(folder / "cot.jsonl", records)
    return write_config(folder / "run.yaml", _settings(folder), sections)


def write_config(path: Path, settings: dict[str, Any], sections: dict[str, Any]) -> Path:
    """`settings` with `sections` put over them, as YAML."""
    merged = {**settings}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return path


def train(config: Path, *overrides: str, processes: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run train_ds.py to its end in processes of one thread; see `launched` for the way it is started."""
    return run(command(config, *overrides, processes=processes), **options)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A command of `launched` to its end, in the project's root."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False, **options
    )


def command(config: Path, *overrides: str, processes: int = 1) -> list[str]:
    """train_ds.py with a configuration."""
    return launched(str(ROOT / "train_ds.py"), "--config", str(config), *overrides, processes=processes)


def launched(*arguments: str, processes: int = 1) -> list[str]:
    """Plain python for one process, torchrun for more."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *arguments]


def environment() -> dict[str, str]:
    """This process's, without rank variables and with one thread."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def own_noise(printed: str) -> list[str]:
    """Lines of a process's output that our own code is to blame for: a traceback, an error, a warning from our files.

    Other packages may print what they like; a new warning of theirs breaks no test.
    """
    ours = rf"({re.escape(str(ROOT))}/)?(configs|dataset|model|scripts|tests|utils|train_ds\w*)(/\S+)?\.py"
    pattern = re.compile(rf"Traceback \(most recent call last\)|error: |{ours}:\d+: \w*Warning: ")
    return [line for line in printed.splitlines() if pattern.match(line)]


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "stage": "teacher",
        "output_dir": str(folder / "run"),
        "model": {
            "base": str(folder / "base"),
            "sam_checkpoint": str(folder / "base" / "sam.safetensors"),
            "sam_type": str(folder / "base" / "sam.json"),
            "sam_image_size": SAM_SIDE,
            "system_prompt": "none",
            "decode_frames_per_step": 2,
        },
        "trainable": {"lora_rank": 2, "lora_dropout": 0.1},
        "data": {
            "root": str(folder / "data"),
            "answer": "class",
            "num_workers": 0,
            "num_frames": 2,
            "audio_padding_seconds": None,
            "feature_cache": "memory",
        },
        "optim": {"lr": 1e-3, "steps": 6, "warmup_steps": 1},
        "engine": {
            "micro_batch": 1,
            "accumulation": 2,
            "precision": "fp32",
            "gradient_checkpointing": False,
            "threads": 1,
        },
        "log": {"save_every": 2, "tensorboard": False},
    }
