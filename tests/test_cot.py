"""Reasoning files: what is read, and every faulty line reported with its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset.cot import CotRecord, import_published, read_cot, rows_with_reasoning, write_cot
from dataset.refavs import RefAvsIndex
from tests.data_builders import write_lines, write_metadata
from utils.errors import DataError

CELLO = {
    "row": 0,
    "uid": "-a_b_0_10000_cello_1",
    "reasoning": "I see a cello. The target is the cello.",
    "target": "cello",
}
DRYER = {
    "row": 1,
    "uid": "-a_b_0_10000_hair-dryer_1",
    "reasoning": "The target is the hair-dryer.",
    "target": "hair-dryer",
}


@pytest.fixture
def index(tmp_path: Path) -> RefAvsIndex:
    write_metadata(tmp_path)
    return RefAvsIndex(tmp_path)


def test_records_are_keyed_by_row(tmp_path: Path, index: RefAvsIndex) -> None:
    first = write_lines(tmp_path / "a.jsonl", [DRYER, "", {**CELLO, "model": "more keys are allowed"}])
    records = read_cot([first], index)
    assert records[0] == CotRecord(0, CELLO["uid"], CELLO["reasoning"], "cello") and list(records) == [1, 0]
    second = write_lines(tmp_path / "b.jsonl", [{**CELLO, "row": 2, "uid": "clip2_0_10000_man_1"}])
    assert set(read_cot([first, second], index)) == {0, 1, 2}
    kept = rows_with_reasoning(index.rows("train"), records)
    assert [r.row for r in kept] == [0, 1]


@pytest.mark.parametrize("ending", [" It is [SEG].", "\nIt is [SEG]. ", " it is [SEG]"])
def test_own_ending_is_stripped(tmp_path: Path, ending: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**CELLO, "reasoning": CELLO["reasoning"] + ending}])
    assert read_cot([path])[0].reasoning == CELLO["reasoning"]


def test_writing_and_reading_back(tmp_path: Path, index: RefAvsIndex) -> None:
    records = [
        CotRecord(1, DRYER["uid"], "A line\nbreak and \u2028 — 狗.", "hair-dryer"),
        CotRecord(0, CELLO["uid"], "x", "y"),
    ]
    write_cot(tmp_path / "a.jsonl", records)
    assert list(read_cot([tmp_path / "a.jsonl"], index).values()) == records[::-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"row": 0, "uid"', "malformed JSON"),
        ("[1, 2]", "a list"),
        ({**CELLO, "row": "0"}, "row = '0'; must be a whole number"),
        ({**CELLO, "row": True}, "row = True"),
        ({k: v for k, v in CELLO.items() if k != "reasoning"}, "reasoning = None; must be text"),
        ({**CELLO, "target": " "}, "target is empty"),
        ({**CELLO, "reasoning": "  "}, "reasoning is empty"),
        ({**CELLO, "reasoning": "It is [SEG]."}, "reasoning is empty"),
        ({**CELLO, "reasoning": "x" * 2001}, "reasoning has 2001 characters"),
        ({**CELLO, "row": 99}, r"row 99 does not exist in the metadata \(8 rows\)"),
        ({**CELLO, "row": 4}, "belongs to no split"),
        ({**CELLO, "uid": DRYER["uid"]}, "row 0 has uid '-a_b_0_10000_cello_1', not"),
        (DRYER, "row 1 is given in .*, line 1 too"),
    ],
)
def test_faulty_line_is_named(tmp_path: Path, index: RefAvsIndex, line: dict | str, words: str) -> None:
    path = write_lines(tmp_path / "cot.jsonl", [DRYER, "", line])
    with pytest.raises(DataError, match=rf"cot\.jsonl, line 3: .*{words}.*Remedy"):
        read_cot([path], index)


def test_all_faults_are_reported_at_once(tmp_path: Path, index: RefAvsIndex) -> None:
    path = write_lines(tmp_path / "cot.jsonl", ["{"] * 25 + [CELLO])
    with pytest.raises(DataError, match=r"25 faulty reasoning records(.|\n)*line 20(.|\n)*and 5 more"):
        read_cot([path], index)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file.*Remedy"):
        read_cot([tmp_path / "none.jsonl"])


def test_long_records_are_dropped_on_request(tmp_path: Path, index: RefAvsIndex) -> None:
    path = write_lines(tmp_path / "cot.jsonl", [{**CELLO, "reasoning": "x" * 2000}, {**DRYER, "reasoning": "x" * 1999}])
    assert set(read_cot([path], index, too_long="drop")) == {1}


def test_released_conclusions_are_put_in_the_words_that_are_read(
    tmp_path: Path, index: RefAvsIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """The example of the paper's section 6.1 ends "the correct target is ”violin”"; section 3.1 does not."""
    path = tmp_path / "reason.json"
    elements = ["Hear, the correct target is ”cello”.", "So the target is hair-dryer. It is [SEG].", "Chain.", "x"]
    path.write_text(json.dumps([{"reasoning": text} for text in elements]), encoding="utf-8")
    with caplog.at_level("INFO", "aurora.data"):
        records = import_published(path, index)
    wanted = ["Hear, the target is cello.", "So the target is hair-dryer.", "Chain.", "x"]
    assert [r.reasoning for r in records] == wanted
    assert '1 of 4 conclusions rewritten as "the target is X."' in caplog.text


def test_published_list_is_joined_by_position(tmp_path: Path, index: RefAvsIndex) -> None:
    path = tmp_path / "reason.json"
    elements = [{"reasoning": f"Chain {n}. It is [SEG]."} for n in range(4)]
    path.write_text(json.dumps(elements), encoding="utf-8")
    records = import_published(path, index)
    assert [(r.row, r.uid, r.reasoning, r.target) for r in records[:2]] == [
        (0, CELLO["uid"], "Chain 0.", "cello"),
        (1, DRYER["uid"], "Chain 1.", "hair-dryer"),
    ]
    write_cot(tmp_path / "out.jsonl", records)
    assert len(read_cot([tmp_path / "out.jsonl"], index)) == 4

    elements[2]["reasoning"] = "x" * 2000
    path.write_text(json.dumps(elements), encoding="utf-8")
    with pytest.raises(DataError, match=r"element 2 \(row 2, clip2_0_10000_man_1\): reasoning has 2000"):
        import_published(path, index)
    assert [r.row for r in import_published(path, index, too_long="drop")] == [0, 1, 3]  # positions still count

    for content, words in [
        (json.dumps(elements[:3]), r"3 elements, but split train has 4 rows.*Remedy"),
        ('{"a": 1}', "a dict, but"),
        ("[", "no valid JSON"),
        (
            '[{"reasoning": ""}, {}, 3, {"reasoning": "x"}]',
            r"3 faulty(.|\n)*element 0 (.|\n)*element 1 (.|\n)*element 2",
        ),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            import_published(path, index)
