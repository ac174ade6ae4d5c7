"""Scores of a split: pooling in row order, groups, failed generations, and files that survive a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.evaluation_cases import make_prediction, make_sample
from utils.errors import DataError
from utils.evaluation import SplitTask
from utils.files import hash_files, write_json
from utils.metrics import fit_logits, fit_masks, score_batch
from utils.results import PartWriter, decode_masks, drop_other_parts, encode_masks, read_parts
from utils.scoring import RowResult, score_row, score_split

PROTOCOLS = ("official", "per_expression")
KINDS = ("visual", "audio", "spatial")


def right_class(text, truth, reference):
    return truth["says"] in text


def results(count=10, **changes):
    samples = [make_sample(row, kind=KINDS[row % 3], **changes) for row in range(count)]
    predictions = [make_prediction(sample, seed=row) for row, sample in enumerate(samples)]
    rows = [score_row(s, p, PROTOCOLS, right_class) for s, p in zip(samples, predictions, strict=True)]
    return samples, predictions, rows


def literal(samples, predictions, protocol, batch):
    """Mean over batches of consecutive rows, each scored as one tensor."""
    scores = []
    for start in range(0, len(samples), batch):
        logits = torch.stack([fit_logits(p.mask_logits, protocol) for p in predictions[start : start + batch]])
        masks = torch.stack([fit_masks(s.masks, protocol) for s in samples[start : start + batch]])
        scores.append(score_batch(logits, masks, protocol))
    return [100 * float(np.mean([getattr(s, name) for s in scores])) for name in "jfs"]


@pytest.mark.parametrize(("protocol", "batch"), [("official", 4), ("per_expression", 1)])
def test_split_scores_are_those_of_batches_in_row_order(protocol, batch):
    samples, predictions, rows = results(10)
    got = score_split(rows[::-1], PROTOCOLS)
    j, f, _ = literal(samples, predictions, protocol, batch)
    assert (got[protocol]["J"], got[protocol]["F"]) == (j, f)
    assert got[protocol]["J&F"] == (j + f) / 2
    assert got[protocol]["n"] == got["n"] == 10


def test_kinds_are_grouped_in_row_order_and_counted():
    samples, predictions, rows = results(10)
    got = score_split(rows, PROTOCOLS)["kinds"]
    assert {kind: group["n"] for kind, group in got.items()} == {"visual": 4, "audio": 3, "spatial": 3}
    j, f, _ = literal(samples[0::3], predictions[0::3], "official", 4)
    assert (got["visual"]["official"]["J"], got["visual"]["official"]["F"]) == (j, f)


def test_shares_are_percentages_of_rows():
    _, _, rows = results(8)
    got = score_split(rows, PROTOCOLS)
    right = np.mean([r.answer_class == r.class_name for r in rows])
    assert got["class_accuracy"] == 100 * right and 0 < right < 1
    assert got["faithful"] == 100 * np.mean([r.faithful for r in rows]) and got["faithful_n"] == 8
    assert got["format_share"] == 100
    assert sum(group["n"] for group in got["classes"].values()) == 8


def test_null_rows_give_s_alone():
    samples, predictions, rows = results(8, class_name="null", empty=True)
    got = score_split(rows, PROTOCOLS)
    assert set(got["official"]) == {"S", "n"}
    assert got["official"]["S"] == literal(samples, predictions, "official", 4)[2]
    assert got["per_expression"]["S"] == literal(samples, predictions, "per_expression", 1)[2]


def test_failed_generation_is_an_empty_mask_and_listed():
    sample = make_sample(5)
    prediction = make_prediction(sample, has_seg=False)
    row = score_row(sample, prediction, PROTOCOLS)
    got = score_split([row], PROTOCOLS)
    assert got["failed"] == [5] and got["n"] == 1
    assert got["official"]["J"] == 0 and got["per_expression"]["J"] == 0
    share = sample.masks.float().mean((1, 2))
    floor = (1.3 * share / (0.3 * share + 1)).mean()
    assert got["per_expression"]["F"] == pytest.approx(100 * floor.item(), abs=1e-4)


def test_unknown_chains_are_not_judged():
    sample = make_sample(0, truth=None)
    got = score_split([score_row(sample, make_prediction(sample), PROTOCOLS, right_class)], PROTOCOLS)
    assert got["faithful"] is None and got["faithful_n"] == 0


def test_rows_survive_json_to_the_bit():
    _, _, rows = results(6)
    again = [RowResult.from_json(json.loads(json.dumps(r.to_json()))) for r in rows]
    assert score_split(again, PROTOCOLS) == score_split(rows, PROTOCOLS)


def test_wrong_pairs_doubles_and_nothing_are_refused():
    _, predictions, rows = results(2)
    with pytest.raises(ValueError, match="row 0 was paired with row 7"):
        score_row(make_sample(7), predictions[0], PROTOCOLS)
    with pytest.raises(ValueError, match=r"rows \[1\] were predicted twice"):
        score_split([*rows, rows[1]], PROTOCOLS)
    with pytest.raises(ValueError, match="without predictions"):
        score_split([], PROTOCOLS)
    bad = make_sample(3)
    broken = make_prediction(bad, logits=torch.full(bad.masks.shape, float("nan")))
    with pytest.raises(ValueError, match=r"row 3 \(clip_hair-dryer_3\) cannot be scored: logits of frame 0 hold NaN"):
        score_row(bad, broken, PROTOCOLS)


def test_a_truncated_last_line_is_dropped_and_rewritten(tmp_path):
    with PartWriter(tmp_path, 0) as part:
        part.append([{"row": 1, "x": "a"}, {"row": 2, "x": "b"}])
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"row": 3, "x')
    assert set(read_parts(tmp_path)) == {1, 2}
    with PartWriter(tmp_path, 0) as part:
        part.append([{"row": 3, "x": "c"}])
    with PartWriter(tmp_path, 1) as part:
        part.append([{"row": 4, "x": "d"}])
    assert {row: r["x"] for row, r in read_parts(tmp_path).items()} == {1: "a", 2: "b", 3: "c", 4: "d"}


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rank0.jsonl").write_text('{"row": 1}\n{"row"\n{"row": 2}\n')
    with pytest.raises(DataError, match="rank0.jsonl:2"):
        read_parts(tmp_path)


def test_identity_follows_every_fact_and_drops_the_rest(tmp_path):
    def identity(facts):
        return SplitTask(tmp_path, "val", (1,), ("official",), 1, facts).identity

    one, other = identity({"checkpoint": "a", "probe": "none"}), identity({"probe": "none", "checkpoint": "b"})
    assert one != other and one == identity({"probe": "none", "checkpoint": "a"})
    for name in (one, other):
        PartWriter(tmp_path / f"parts-{name}", 0).__exit__(None, None, None)
    drop_other_parts(tmp_path, one)
    assert [p.name for p in tmp_path.iterdir()] == [f"parts-{one}"]


def test_hash_follows_content(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    before = hash_files(tmp_path.iterdir())
    (tmp_path / "b").write_text("3")
    assert hash_files(tmp_path.iterdir()) != before


def test_masks_survive_rle():
    masks = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0)).numpy() > 0.6
    rles = json.loads(json.dumps(encode_masks(masks)))
    assert rles[0]["size"] == [9, 14]
    assert np.array_equal(decode_masks(rles), masks)


def test_json_files_refuse_nan_and_stay_whole(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"J": 1.5})
    with pytest.raises(ValueError):
        write_json(path, {"J": float("nan")})
    assert json.loads(path.read_text()) == {"J": 1.5}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
