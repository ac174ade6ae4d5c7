"""Bootstrap intervals, groups and paired comparisons against hand-made cases and loop-written oracles."""

from __future__ import annotations

import numpy as np
import pytest

from tests.report_case import ROWS, make_world, write_evaluation, write_run
from utils.errors import DataError
from utils.report.breakdown import break_down, compare, mean_intervals, size_names
from utils.report.runs import find_evaluations, pairs, read_evaluation, run_summary


def test_intervals_equal_a_loop_over_drawn_clips():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 5.0], [7.0, 1.0], [9.0, 0.0]])
    clips = ["a", "a", "b", "c", "c"]
    found = mean_intervals(values, clips, draws=300, seed=3)
    draws = np.random.default_rng(3).multinomial(3, np.full(3, 1 / 3), size=300)
    for k, estimate in enumerate(found):
        means = []
        for counts in draws:
            drawn = [v for c, times in zip("abc", counts, strict=True) for _ in range(times)
                     for v, owner in zip(values[:, k], clips, strict=True) if owner == c]
            means.append(sum(drawn) / len(drawn))
        assert estimate.mean == pytest.approx(values[:, k].mean())
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
        assert (estimate.rows, estimate.clips) == (5, 3)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        clip_means = rng.normal(50, 10, 40)
        values = np.repeat(clip_means, 3) + rng.normal(0, 2, 120)
        found = mean_intervals(values[:, None], np.repeat(np.arange(40), 3).tolist(), draws=300, seed=trial)[0]
        hits += found.low <= 50 <= found.high
    assert 180 <= hits <= 198  # about 190 of 200; over single rows it would be far less


def test_intervals_of_one_clip_and_of_nothing():
    found = mean_intervals(np.array([[1.0], [3.0]]), ["a", "a"])[0]
    assert (found.mean, found.low, found.high) == (2.0, None, None)
    for values, clips in ((np.zeros((0, 1)), []), (np.zeros((2, 1)), ["a"]), (np.array([[np.nan]]), ["a"])):
        with pytest.raises(ValueError, match="values"):
            mean_intervals(values, clips)


def test_sizes_are_thirds():
    names = size_names({row: (row + 1) / 100 for row in range(9)})
    assert [names[row].split()[0] for row in range(9)] == ["small"] * 3 + ["medium"] * 3 + ["large"] * 3
    assert size_names({0: 0.5, 1: 0.5}) == {}


def test_a_run_is_read_back_broken_down_and_compared(tmp_path):
    folder = write_run(tmp_path / "run", make_world(tmp_path / "data"))
    found = find_evaluations(folder)
    assert [e.name for e in found] == ["teacher", "sft", "sft_zero"]
    sft = found[1]
    assert list(sft.metrics) == ["test_s", "test_u", "test_n"] and sorted(sft.rows) == list(range(len(ROWS)))
    dimensions = break_down(list(sft.rows.values()), {0: "small (x)", 1: "large (x)"})
    split = dimensions["Split"]
    assert split["seen (test_s)"].scores["J"].mean == pytest.approx((50 + 5 + 80 + 53) / 4)
    assert split["seen (test_s)"].class_accuracy == 75 and split["unseen (test_u)"].scores["J&F"].clips == 2
    assert list(dimensions["Mask size"]) == ["small (x)", "large (x)"]
    assert dimensions["Null references"]["test_n: S, lower is better"].scores["S"].mean == 12.5
    assert [(a.name, b.name) for a, b in pairs(found)] == [("teacher", "sft"), ("sft", "sft_zero")]
    comparison = compare(*pairs(found)[0])
    whole = comparison.groups["all rows"]
    changes = [(5 + 9) / 2 - (51 + 61) / 2, (80 + 88) / 2 - (52 + 62) / 2, (50 + 60) / 2 - (90 + 98) / 2]
    assert whole.change.mean == pytest.approx(sum(changes) / 8)
    assert (whole.wins, whole.losses, whole.change.rows) == (1, 2, 8)
    assert (comparison.class_won, comparison.class_lost) == (0, 1)
    assert [c.after.row for c in comparison.gains] == [2] and [c.after.row for c in comparison.losses] == [1, 0]


def test_the_summary_tells_stages_from_probes(tmp_path):
    found = find_evaluations(write_run(tmp_path / "run", tmp_path / "data"))
    summary = run_summary(found)
    assert list(summary["stages"]) == ["teacher", "sft"] and summary["probes"]["zero_audio"]["stage"] == "sft"
    assert summary["stages"]["sft"]["mix"]["J&F"] == 60.0 and summary["stages"]["sft"]["answer"] == "reasoning"


def test_other_data_cannot_be_compared(tmp_path):
    one = read_evaluation(write_evaluation(tmp_path / "a", tmp_path), "a")
    other = read_evaluation(write_evaluation(tmp_path / "b", tmp_path, {3: {"uid": "x_y_1"}}), "b")
    with pytest.raises(DataError, match=r"row 3 is .*_dog_2 .*x_y_1.*Remedy"):
        compare(one, other)
    (tmp_path / "b/test_u/predictions.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="test_u: no complete evaluation.*Remedy"):
        read_evaluation(tmp_path / "b", "b")
