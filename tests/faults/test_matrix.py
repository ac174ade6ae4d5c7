"""`tests/faults/fault_matrix.py` with one kill of the teacher stage; all cases with AURORA_FAULT_KILLS=20."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.faults.fault_matrix import Tally, added, compare, table
from tests.faults.lives import Kill, draw_kill, live
from tests.tiny_run import ROOT, environment

EVERY = ("teacher", "sft", "evaluation", "mining", "correction", "reflective", "grpo")
KILLS = int(os.environ.get("AURORA_FAULT_KILLS", "1"))
CASES = EVERY if KILLS > 1 else ("teacher",)
"""All would take minutes of the suite, and the stages share one loop."""


def test_nothing_is_lost_or_doubled_wherever_processes_are_killed(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--kills", str(KILLS), "--only", ",".join(CASES), "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "tests/faults/fault_matrix.py", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    tallies = [Tally(**case) for case in json.loads(figures.read_text())["cases"]]
    assert tuple(tally.name for tally in tallies) == CASES
    for tally in tallies:
        assert tally.kills >= KILLS and tally.runs >= 1 and tally.right, tally
        assert all(seconds < 60 for seconds in tally.detect_seconds), tally


def test_moments_are_seeded_and_cover_both_kinds() -> None:
    drawn = [draw_kill(random.Random(f"0/{i}"), 10.0, 2) for i in range(200)]
    assert drawn == [draw_kill(random.Random(f"0/{i}"), 10.0, 2) for i in range(200)]
    assert all(0 <= kill.after <= 10 for kill in drawn)
    kinds = Counter(kill.victims for kill in drawn)
    assert kinds.keys() == {(0,), (1,), (0, 1)} and min(kinds.values()) > 20


def test_lives_tell_killed_from_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def sleeps() -> int:
        (tmp_path / "work").write_text("x")
        time.sleep(30)
        return 0

    def size() -> int:
        path = tmp_path / "work"
        return path.stat().st_size if path.exists() else 0

    life = live(sleeps, 2, log, size, Kill(3.0, (1,)))
    assert life.status == -9 and life.seconds < 20 and life.detected is not None and life.first_work is not None
    assert live(lambda: 3, 1, log, size).status == 3
    assert live(lambda: 0, 1, log, size).status == 0
    assert live(lambda: 1 // 0, 1, log, size).status == 1 and "ZeroDivisionError" in log.read_text()


class _Case:
    """What `compare` asks of a case."""

    def items(self, folder: Path) -> list[int]:
        return json.loads((folder / "rows").read_text())

    def files(self, folder: Path) -> dict[str, bytes]:
        return {"rows": (folder / "rows").read_bytes()}


def test_losses_and_doubles_are_counted(tmp_path: Path) -> None:
    for name, rows in (("whole", [1, 2, 3]), ("killed", [1, 3, 3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_text(json.dumps(rows))
    tally = Tally("case", 1.0, killed_all=1, runs=1, resume_seconds=[1.0, 3.0])
    compare(_Case(), tmp_path / "whole", tmp_path / "killed", tally)
    assert (tally.lost, tally.doubled, tally.different, tally.right) == (1, 1, ["rows"], False)
    assert "| case | 0 / 1 | 1 | 1 | 1 | rows | - | 2.0, 3.0 | 1.0 |" in table([tally])
    both = added([tally], [Tally("case", 2.0, killed_one=3, runs=2, resume_seconds=[7.0]), Tally("other", 1.0)])
    assert "| case | 3 / 1 | 3 | 1 | 1 | rows | - | 3.0, 7.0 | 1.0 |" in table(both) and both[1].name == "other"
