"""Does a long run over a large table stay fast and small? Start-up, memory and time per step, measured on a real run.

    python scripts/bench_scale.py --rows 200000 --steps 2000 --json runs/scale.json

Writes a table of that many rows (and as many reasoning records) over a few small clips, starts train_ds.py on it (stage
sft, the base of the mini world, one clip a step, 2 decoding processes) and watches the processes: seconds until the
first step is done, own memory (USS) of training and of each decoding process, processor time and wall time of a step.
Slopes are those of a straight line through the second half of the run, where caches are full.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.mini_world import WorldSettings, make_mini_world  # noqa: E402 - the project's root must be on the path first
from dataset.refavs import RefAvsIndex  # noqa: E402
from utils.results import write_json, write_jsonl  # noqa: E402

WORLD = WorldSettings(train=8, val=0, test_s=0, test_u=0, test_n=0, train_null=0, rows_per_train_clip=4)
SETTINGS = ("loss.distill=0", "sft.teacher_checkpoint=null", "sft.student_start=init_from",
            "sft.freeze_mask_decoder=false", "optim.lr=1e-5",
            "data.feature_cache=memory", "data.num_frames=2", "data.num_workers=2", "engine.micro_batch=1",
            "engine.threads=1", "log.every=1", "log.save_every=1000000", "log.tensorboard=false")  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The processes at one moment."""

    seconds: float
    """Since the start."""
    step: int
    """Steps done."""
    processor: float
    """Seconds of processor time of the training process."""
    own: float
    """MB that only the training process holds."""
    workers: float
    """MB that only the decoding processes hold, mean over them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="of metadata (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of training (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_table(folder / "data", options.rows)
        index_seconds = timed_index(folder / "data")
        looks = watch(folder, options.steps)
    figures = {"rows": options.rows, "index_seconds": round(index_seconds, 2), **summary(looks)}
    for name, value in figures.items():
        print(f"{name:40} {value}")
    if options.json:
        write_json(options.json, {**figures, "looks": [list(look.__dict__.values()) for look in looks]})
    return 0


def write_table(root: Path, rows: int) -> None:
    """A small world whose rows stand in the table again and again, each under a uid of its own, with its reasoning."""
    make_mini_world(root, WORLD, progress=False)
    known = [row for row in RefAvsIndex(root).rows("train") if not row.is_null]
    (root / "mini_truth.jsonl").unlink()
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(("vid", "uid", "split", "fid", "exp"))
        records = []
        for number in range(rows):
            row = known[number % len(known)]
            uid = f"{row.clip}_{row.class_name}_{number}"
            writer.writerow((row.vid, uid, "train", row.fid, f"{row.reference} Number {number}."))
            reasoning = f"The images show things, seen {number} times. So the target is the {row.class_name}."
            records.append({"row": number, "uid": uid, "reasoning": reasoning, "target": row.class_name})
    write_jsonl(root / "cot.jsonl", records)


def timed_index(root: Path) -> float:
    """Seconds to read the table."""
    start = time.perf_counter()
    RefAvsIndex(root)
    return time.perf_counter() - start


def watch(folder: Path, steps: int) -> list[Look]:
    """Train and look at the processes every second."""
    run, log = folder / "run", folder / "log"
    arguments = ["--config", str(ROOT / "configs" / "mini" / "sft.yaml"), *SETTINGS, f"data.root={folder}/data",
                 f"data.cot=[{folder}/data/cot.jsonl]", f"optim.steps={steps}", f"output_dir={run}"]  # fmt: skip
    looks: list[Look] = []
    with log.open("w") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_ds.py"), *arguments], cwd=ROOT, stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        while process.poll() is None:
            look = look_at(psutil.Process(process.pid), run / "metrics.jsonl", start)
            if look is not None:
                looks.append(look)
            time.sleep(0.1 if not looks else 1.0)
    if process.returncode != 0:
        raise RuntimeError(f"train_ds.py ended with {process.returncode}:\n{log.read_text()}")
    return looks


def look_at(process: psutil.Process, metrics: Path, start: float) -> Look | None:
    """None before the first step, and where a process has just ended."""
    try:
        lines = metrics.read_bytes().splitlines()
        if not lines:
            return None
        step = json.loads(lines[-1])["step"]
        times = process.cpu_times()
        workers = [child.memory_full_info().uss / 1e6 for child in process.children()]
        own = process.memory_full_info().uss / 1e6
    except (OSError, ValueError, psutil.Error):
        return None
    elapsed = time.monotonic() - start
    return Look(elapsed, step, times.user + times.system, own, sum(workers) / max(1, len(workers)))


def summary(looks: list[Look]) -> dict[str, Any]:
    """Figures of a run; slopes are per 1,000 steps."""
    looks = [look for look in looks if look.step < looks[-1].step and look.own and look.workers]  # not while it ends
    table = np.array([list(look.__dict__.values()) for look in looks])
    later = table[len(table) // 2 :]
    steps = np.diff(table[:, 1])
    moved = steps > 0
    middle, wall, processor = table[1:, 1][moved], np.diff(table[:, 0])[moved], np.diff(table[:, 2])[moved]
    half = middle > table[:, 1].mean()
    per_step = {"wall": wall / steps[moved], "processor": processor / steps[moved]}
    found: dict[str, Any] = {"seconds_to_first_step": round(looks[0].seconds, 1), "steps": looks[-1].step}
    for name, values in per_step.items():
        first, second = np.median(values[~half]), np.median(values[half])
        found[f"{name}_ms_per_step_first_half"] = round(1000 * first, 1)
        found[f"{name}_ms_per_step_second_half"] = round(1000 * second, 1)
    for name, column in (("training", 3), ("decoding", 4)):
        slope = np.polyfit(later[:, 1], later[:, column], 1)[0]
        found[f"{name}_mb_at_start"] = round(table[0, column], 1)
        found[f"{name}_mb_at_half"] = round(later[0, column], 1)
        found[f"{name}_mb_at_end"] = round(table[-1, column], 1)
        found[f"{name}_mb_per_1000_steps"] = round(1000 * slope, 2)
    return found


if __name__ == "__main__":
    sys.exit(main())
