"""Sampled answers of stage 3 in a report: which groups are shown, and that their words stay words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report_case import EVIL
from utils.errors import DataError
from utils.report.page import render_page
from utils.report.runs import SAMPLED_GROUPS, read_groups
from utils.results import encode_masks


def record(step: int, row: int, sample: int, **changes: Any) -> dict[str, Any]:
    masks = np.zeros((3, 12, 16), bool)
    masks[:, :6] = True
    return {
        "step": step, "row": row, "uid": "u", "reference": "the dog", "class_name": "dog", "sample": sample,
        "answer": "The target is dog. It is [SEG].", "has_seg": True, "tokens": 9, "truncated": False,
        "rewards": {"format": 1.0, "iou": 0.25}, "reward": 1.25, "advantage": -0.5, "iou": 0.25, "mask_trained": True,
        "masks": encode_masks(masks), **changes,
    }  # fmt: skip


def write(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def test_groups_of_the_first_and_the_last_step(tmp_path: Path) -> None:
    greedy = {"step": 1, "row": 0, "uid": "u", "reference": "the dog", "answer": "x", "has_seg": False}
    rows = [record(step, row, place) for step in (5, 10, 15) for row in range(SAMPLED_GROUPS + 2) for place in range(2)]
    groups = read_groups(write(tmp_path, greedy, *rows))
    assert [(g[0]["step"], g[0]["row"], len(g)) for g in groups] == [
        (step, row, 2) for step in (5, 15) for row in range(SAMPLED_GROUPS)
    ]
    assert read_groups(write(tmp_path, greedy)) == [] == read_groups(tmp_path / "nothing")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"row": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="samples.jsonl:1.*Remedy"):
        read_groups(tmp_path)


def test_page_shows_rewards_words_and_masks() -> None:
    cut = record(5, 0, 1, answer=EVIL, reference=EVIL, masks=[], has_seg=False, truncated=True, mask_trained=False)
    page = render_page("t", {"stages": {}}, samples={"grpo": [[record(5, 0, 0), cut]]})
    assert "Sampled answers" in page and "grpo, step 5: the dog (dog, row 0)" in page
    assert page.count('src="data:image/png;base64,') == 1 and "-0.50" in page and "9 (cut)" in page
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "Sampled answers" not in render_page("t", {"stages": {}})
