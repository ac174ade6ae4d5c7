"""The text-only baseline on a made-up table with the null leak of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset.refavs import RefAvsIndex
from scripts.dev import text_baseline
from scripts.dev.text_baseline import TextBaseline
from tests.data_builders import write_metadata

TRAIN = [(f"t{i}_0_1", f"t{i}_0_1_{name}_1", "train", 0, f"The {word} thing on the left.")
         for i in range(6) for name, word in (("dog", "barking"), ("cello", "wooden"))]  # fmt: skip
NULLS = [(f"t{i}_0_1", f"null_m-t{i}_0_1_null_1", "train", 0, "The sounding object") for i in range(3)]
TEST = [
    ("s0_0_1", "s0_0_1_dog_1", "test_s", 0, "The barking one."),
    ("s0_0_1", "s0_0_1_cello_1", "test_s", 0, "The barking wooden wooden thing."),
    ("s0_0_1", "s0_0_1_dog_2", "test_s", 0, "The sounding object"),
    ("s0_0_1", "s0_0_1_cello_2", "test_s", 0, "The sounding object."),
    *[("s0_0_1", f"null_m-s0_0_1_null_{k}", "test_n", 0, text)
      for k, text in enumerate(("The sounding object", "The sounding object", "the sounding object",
                                "The barking thing on the left."), 1)],
]  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> RefAvsIndex:
    write_metadata(tmp_path, [*TRAIN, *NULLS, *TEST])
    return RefAvsIndex(tmp_path)


def test_null_rows_are_found_by_their_words(index: RefAvsIndex) -> None:
    baseline = TextBaseline(index.rows("train"))
    scores = baseline.score(index.rows("test_n"))
    assert (scores.rows, scores.null_rows, scores.null_found) == (4, 4, 75.0)
    assert scores.s == 50.0 and scores.null_claimed is None and scores.class_accuracy is None
    seen = baseline.score(index.rows("test_s"))
    assert seen.class_accuracy == 50.0 and seen.null_claimed == 50.0 and seen.null_found is None and seen.s is None


def test_the_final_stop_counts_or_not(index: RefAvsIndex) -> None:
    with_stop, without = (TextBaseline(index.rows("train"), flag) for flag in (True, False))
    assert with_stop.words("The Sounding-object's.") == ["the", "sounding-object's", "the sounding-object's", "<stop>"]
    assert without.words("The sounding_object.") == ["the", "sounding", "object", "the sounding object"]
    for text in ("The left", "The left."):
        assert without.predict(text) in ("cello", "dog")
    assert with_stop.predict("The thing") != without.predict("The") or with_stop.predict("The") == "null"


def test_command(index: RefAvsIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text_baseline.main(["--data", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "test_n, with the final stop" in printed and "75.00" in printed
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["learned"] == 15 and kept["scores"]["without it"]["test_n"]["null_rows"] == 4
    write_metadata(tmp_path, TEST)
    assert text_baseline.main(["--data", str(tmp_path)]) == 1
    assert "no row of split train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rows"):
        TextBaseline([])
