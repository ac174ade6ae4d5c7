"""Reasoning and reflective files: what is read, every faulty line reported with its number, and released lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset.records import (
    TRIGGERS,
    CotRecord,
    build_path,
    read_cot,
    read_reflective,
    trigger,
    without_seg,
    write_records,
)
from dataset.refavs import RefAvsIndex
from dataset.released import import_reasoning
from scripts import build_reflective
from tests.data_builders import RIGHT_PATH as RIGHT
from tests.data_builders import ROWS, write_lines, write_metadata, write_reflective_files
from tests.data_builders import WRONG_PATH as WRONG
from utils.errors import DataError

CELLO = {"row": 0, "uid": ROWS[0][1], "reasoning": "I see a cello. The target is the cello.", "target": "cello"}
DRYER = {"row": 1, "uid": ROWS[1][1], "reasoning": "The target is the hair-dryer.", "target": "hair-dryer"}


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


@pytest.mark.parametrize("ending", [" It is [SEG].", "\nIt is [SEG]. ", " it is [SEG]"])
def test_own_ending_is_stripped(tmp_path: Path, ending: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{**CELLO, "reasoning": CELLO["reasoning"] + ending}])
    assert read_cot([path])[0].reasoning == CELLO["reasoning"]


def test_writing_and_reading_back(tmp_path: Path, index: RefAvsIndex) -> None:
    dryer = CotRecord(1, DRYER["uid"], "A line\nbreak and \u2028 — 狗.", "hair-dryer")
    records = [dryer, CotRecord(0, CELLO["uid"], "x", "y")]
    write_records(tmp_path / "a.jsonl", records)
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
        (DRYER, "row 1 is given twice, first in .*, line 1"),
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


# ---- reflective paths


def test_a_path_is_wrong_trigger_right() -> None:
    path = build_path(2, "u_man_1", "man", WRONG, RIGHT, seed=0)
    assert path.part("wrong") == WRONG.removesuffix(" It is [SEG].")
    assert path.part("corrected") == RIGHT.removesuffix(" It is [SEG].")
    assert path.part("trigger") in TRIGGERS and "[SEG]" not in path.reasoning
    assert path.reasoning == " ".join(path.part(name) for name in ("wrong", "trigger", "corrected"))
    with pytest.raises(DataError, match="the wrong path is empty"):
        build_path(2, "u", "man", "It is [SEG].", RIGHT, 0)
    with pytest.raises(DataError, match="ends in 'cello', not in 'man'"):
        build_path(2, "u", "man", WRONG, WRONG, 0)


def test_triggers_are_a_pool_drawn_by_seed_and_row() -> None:
    assert len(set(TRIGGERS)) >= 20
    drawn = [trigger(row, 0) for row in range(400)]
    assert set(drawn) == set(TRIGGERS) and drawn == [trigger(row, 0) for row in range(400)]
    assert drawn != [trigger(row, 1) for row in range(400)]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("So a. It is [SEG].", "So a."),
        ("So a. It is [SEG]. It is [SEG]", "So a."),
        ("It is [SEG]. So a. It is cat [SEG].", "So a."),
        ("So [SEG] a.", "So a."),
        ("It is a dog. So a.", "It is a dog. So a."),
    ],
)
def test_no_seg_stays_in_a_part(text: str, left: str) -> None:
    assert without_seg(text) == left


def test_reflective_files_round_trip_and_choose_their_target(tmp_path: Path) -> None:
    world, path = write_reflective_files(tmp_path)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 2]  # sorted
    index = RefAvsIndex(world)
    whole, late = read_reflective([path], index), read_reflective([path], index, loss_on="correction")
    alone = read_reflective([path], index, "corrected_only", "correction")
    assert list(whole) == [0, 2] and whole[2].loss_from == 0
    assert late[2].reasoning == whole[2].reasoning
    assert late[2].reasoning[late[2].loss_from :] == RIGHT.removesuffix(" It is [SEG].") == alone[2].reasoning
    assert alone[2].loss_from == 0


def test_faulty_reflective_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = json.loads(write_reflective_files(tmp_path)[1].read_text().splitlines()[0])
    spans = good["spans"]
    end = len(good["reasoning"])
    bad = [
        ({**good, "spans": {"wrong": [0, 3]}}, "line 1: spans must name"),
        ({**good, "spans": {**spans, "trigger": [5, 2]}}, "line 2: spans.trigger"),
        ({**good, "spans": {**spans, "wrong": [0, "3"]}}, "line 3: spans.wrong = [0, '3']; must be [start, end]"),
        ({**good, "reasoning": good["reasoning"] + "!"}, f"line 4: spans.corrected ends at {end}, the reasoning at"),
        ({**good, "target": "dog"}, "line 5: the path does not end in the target 'dog'"),
        (good, ""),
        (good, "line 7: row 0 is given twice"),
    ]
    with pytest.raises(DataError) as error:
        read_reflective([write_lines(tmp_path / "bad.jsonl", [line for line, _ in bad])])
    assert "6 faulty reflective records" in str(error.value) and all(words in str(error.value) for _, words in bad)
    with pytest.raises(DataError, match="no record"):
        read_reflective([write_lines(tmp_path / "empty.jsonl", [])])
    fields = {"row": 2, "uid": "u", "target": "man", "wrong": WRONG, "corrected": RIGHT}
    for lines, words in (
        ([{"row": 1}], "c.jsonl, line 1: KeyError('uid')"),
        ([fields, fields], "c.jsonl, line 2: row 2 stands twice"),
    ):
        path = write_lines(tmp_path / "c.jsonl", lines)
        assert build_reflective.main(["--corrections", str(path), "--out", str(tmp_path / "o.jsonl")]) == 1
        assert words in capsys.readouterr().err


# ---- the authors' released lists


def write_list(path: Path, elements: object) -> Path:
    path.write_text(json.dumps(elements), encoding="utf-8")
    return path


def test_released_conclusions_are_put_in_the_words_that_are_read(
    tmp_path: Path, index: RefAvsIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """The example of the paper's section 6.1 ends "the correct target is ”violin”"; section 3.1 does not."""
    texts = ["Hear, the correct target is ”cello”.", "So the target is hair-dryer. It is [SEG].", "Chain.", "x"]
    path = write_list(tmp_path / "reason.json", [{"reasoning": text} for text in texts])
    with caplog.at_level("INFO", "aurora.data"):
        records = import_reasoning(path, index)
    wanted = ["Hear, the target is cello.", "So the target is hair-dryer.", "Chain.", "x"]
    assert [r.reasoning for r in records] == wanted
    assert '1 of 4 conclusions rewritten as "the target is X."' in caplog.text


def test_the_released_list_is_joined_by_position(tmp_path: Path, index: RefAvsIndex) -> None:
    elements = [{"reasoning": f"Chain {n}. It is [SEG]."} for n in range(4)]
    path = write_list(tmp_path / "reason.json", elements)
    records = import_reasoning(path, index)
    assert [(r.row, r.uid, r.reasoning, r.target) for r in records[:2]] == [
        (0, CELLO["uid"], "Chain 0.", "cello"),
        (1, DRYER["uid"], "Chain 1.", "hair-dryer"),
    ]
    write_records(tmp_path / "out.jsonl", records)
    assert len(read_cot([tmp_path / "out.jsonl"], index)) == 4

    elements[2]["reasoning"] = "x" * 2000
    write_list(path, elements)
    with pytest.raises(DataError, match=r"element 2 \(row 2, clip2_0_10000_man_1\): reasoning has 2000"):
        import_reasoning(path, index)
    assert [r.row for r in import_reasoning(path, index, too_long="drop")] == [0, 1, 3]  # positions still count

    empty = [{"reasoning": ""}, {}, 3, {"reasoning": "x"}]
    for content, words in [
        (json.dumps(elements[:3]), r"3 elements, but split train has 4 rows.*Remedy"),
        ('{"a": 1}', "a dict, not a list"),
        ("[", "no JSON file"),
        (json.dumps(empty), r"3 faulty(.|\n)*element 0 (.|\n)*element 1 (.|\n)*element 2"),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            import_reasoning(path, index)


RELEASED = {
    0: (f"{WRONG} Wait, let me re-evaluate… {RIGHT.replace('man.', 'cello.')}", ""),
    1: ("The man plays. So the target is the man. But is that right? Let me check. So the target is the violin.", ""),
    2: (RIGHT, "no sentence opens as a trigger does"),
    3: ("Wait, let me look. So the target is the null.", "no target is named before the trigger"),
}


def test_the_released_reflective_list_is_split_or_said_why_not(
    tmp_path: Path, index: RefAvsIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = index.rows("train")
    texts = {row.row: RELEASED[i][0].replace("violin", row.class_name) for i, row in enumerate(rows)}
    texts[rows[0].row] = texts[rows[0].row].replace("the cello.", f"the {rows[0].class_name}.")
    released = write_list(tmp_path / "list.json", [{"reasoning": text} for text in texts.values()])
    arguments = ["--import-published", str(released), "--out", str(tmp_path / "out.jsonl"), "--data", str(tmp_path)]
    assert build_reflective.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 reflective paths" in shown
    for i, row in enumerate(rows):
        reason = RELEASED[i][1]
        assert not reason or f"not split, 1: {reason} (rows {row.row})" in shown
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    parts = [[r["reasoning"][a:b] for a, b in r["spans"].values()] for r in records]
    assert [p[1] for p in parts] == ["Wait, let me re-evaluate…", "But is that right? Let me check."]
    assert parts[0][0] == WRONG.removesuffix(" It is [SEG].") and not any("[SEG]" in r["reasoning"] for r in records)
    assert set(read_reflective([tmp_path / "out.jsonl"], index)) == {rows[0].row, rows[1].row}
    write_list(released, [{"row": rows[1].row, "reasoning": texts[rows[1].row]}])  # an element may name its row
    assert build_reflective.main(arguments) == 0
    assert set(read_reflective([tmp_path / "out.jsonl"], index)) == {rows[1].row}
    capsys.readouterr()
    for elements, words in (
        ([RIGHT], "1 elements, but split train has 4 rows"),
        ([{"row": 99, "reasoning": RIGHT}], "element 0: its row does not exist"),
        ([{"row": 1, "reasoning": RIGHT}] * 2, "element 1: its row is named twice"),
    ):
        write_list(released, elements)
        assert build_reflective.main(arguments) == 1
        assert words in capsys.readouterr().err
