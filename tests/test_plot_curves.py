"""The figures of stage 3 from metrics files, and what is said of runs that have none."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from scripts.plot_curves import HEIGHT, WIDTH, bgr, main
from utils.curves import COLOURS


def write_run(folder: Path, **scalars: float) -> Path:
    folder.mkdir()
    rows = [{"step": step, **{name: value * step for name, value in scalars.items()}} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.smoke
def test_figures_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", reward_all=0.1, reward_class=0.2, reward_iou=0.3, group_std=0.0, entropy=1.0)
    second = write_run(tmp_path / "b", reward_all=0.2)
    assert main([f"with={first}", str(second), "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).name for p in written] == ["figure_8.png", "figure_9.png", "figure_policy.png"]
    shapes = [cv2.imread(path).shape for path in written]
    assert shapes == [(HEIGHT, 3 * WIDTH, 3), (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH, 3)]
    picture = cv2.imread(written[0])
    in_both, in_one = picture[:, :WIDTH], picture[:, WIDTH : 2 * WIDTH]
    for colour, counts in ((COLOURS[0], (True, True)), (COLOURS[1], (True, False))):
        found = tuple(bool((part == bgr(colour)).all(-1).any()) for part in (in_both, in_one))
        assert found == counts, colour


def test_wrong_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
    sft = write_run(tmp_path / "sft", ce_loss=1.0)
    assert main([str(sft), "--out", str(tmp_path / "out")]) == 1
    assert "no scalar of stage grpo" in capsys.readouterr().err
