"""The metadata table: the real one by its counts, and every rule by a row that breaks it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from dataset.refavs import RefAvsIndex, Split, split_uid
from tests.data_builders import ROWS, write_lines, write_metadata
from utils.errors import DataError

REAL_TABLE = Path(__file__).parent / "fixtures" / "refavs_metadata.csv.gz"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RefAvsIndex:
    root = tmp_path_factory.mktemp("refavs")
    (root / "metadata.csv").write_bytes(gzip.decompress(REAL_TABLE.read_bytes()))
    return RefAvsIndex(root)


@pytest.mark.parametrize(
    ("split", "rows", "clips", "classes", "null_rows"),
    [
        ("train", 14113, 2919, 39, 608),
        ("val", 1349, 275, 39, 72),
        ("test_s", 2288, 273, 34, 0),
        ("test_u", 1656, 269, 24, 0),
        ("test_n", 1028, 257, 1, 1028),
    ],
)
def test_real_table_counts(real: RefAvsIndex, split: str, rows: int, clips: int, classes: int, null_rows: int) -> None:
    found = real.rows(split)
    assert (len(found), len(real.clips(split))) == (rows, clips)
    assert len({r.class_name for r in found}) == classes
    assert sum(r.is_null for r in found) == null_rows


def test_real_table_details(real: RefAvsIndex) -> None:
    rows = [r for split in Split for r in real.rows(split)]
    assert real.row_count == 20459 and len(rows) == 20459 - 25  # 25 rows are TODO
    repeated = {uid for uid, n in Counter(r.uid for r in rows).items() if n > 1}
    assert len(repeated) == 11 and len({r.row for r in rows}) == len(rows)
    assert all(r.clip.startswith(("null_c-", "null_m-")) == r.is_null for r in rows)
    assert all(r.clip.endswith(r.vid) for r in rows)
    assert {"emergency-car", "hair-dryer", "vacuum-cleaner"} <= {r.class_name for r in rows}
    assert sum(r.vid.startswith("-") for r in rows) > 73  # ids that a shell would take for options
    assert max(r.fid for r in rows) == 32
    quoted = [r for r in rows if "," in r.reference]
    assert [r.uid for r in quoted] == ["G8YSz3L1R3M_75000_85000_boy_1"]


def test_rows_of_a_small_table(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    index = RefAvsIndex(tmp_path)
    first, dryer, _, null = index.rows(Split.TRAIN)
    assert (first.row, first.clip, first.class_name, first.number) == (0, "-a_b_0_10000", "cello", 1)
    assert first.reference == "The cello on the left."  # outer spaces go
    assert (dryer.class_name, dryer.fid, dryer.reference) == ("hair-dryer", 1, "The loud, hot thing.")
    assert null.is_null and null.clip == "null_m--a_b_0_10000" and null.vid == "-a_b_0_10000"
    assert [(r.row, r.fid) for r in index.rows("test_s")[1:]] == [(6, 2), (7, 0)]  # one uid, two rows
    assert index.row(4) is None and index.row(99) is None and index.rows("val") == []
    assert index.mask_folder(dryer) == tmp_path / "gt_mask" / "-a_b_0_10000" / "fid_1"
    assert index.audio_path(null.clip) == tmp_path / "media" / null.clip / "audio.wav"


def test_byte_order_mark_lf_and_other_column_order_are_read(tmp_path: Path) -> None:
    text = "\ufeffexp,vid,uid,split,fid\na dog,v,v_dog_1,val,3\n\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    (row,) = RefAvsIndex(tmp_path).rows("val")
    assert (row.reference, row.fid, row.clip) == ("a dog", 3, "v")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("v", "v_dog_1", "test", 0, "a dog"), ["split = 'test'", "test_s"]),
        (("v", "v_dog_1", "val", "-1", "a dog"), ["fid = '-1'", "from 0"]),
        (("v", "v_dog_1", "val", "1.0", "a dog"), ["fid = '1.0'"]),
        (("v", "v_dog_1", "val", "9" * 5000, "a dog"), ["fid = "]),
        (("v", "v_dog", "val", 0, "a dog"), ["uid = 'v_dog'", "<clip>_<class>_<number>"]),
        (("v", "v_dog_one", "val", 0, "a dog"), ["uid = 'v_dog_one'"]),
        (("v", "_dog_1", "val", 0, "a dog"), ["uid = '_dog_1'"]),
        (("v", "../../etc_dog_1", "val", 0, "a dog"), ["uid = '../../etc_dog_1'", "one folder"]),
        (("v", ".._dog_1", "val", 0, "a dog"), ["one folder"]),
        (("v", "/tmp/x_dog_1", "val", 0, "a dog"), ["one folder"]),
        (("v", "C:\\x_dog_1", "val", 0, "a dog"), ["one folder"]),
        (("v", "v_dog_1", "val", 0, "  "), ["exp = '  '", "not empty"]),
        (("v", "v_dog_1", "val", 0), ["5 cells", "has 4"]),
    ],
)
def test_bad_row_names_file_row_value_and_remedy(tmp_path: Path, row: tuple, words: list[str]) -> None:
    path = write_metadata(tmp_path, [("v", "v_dog_1", "val", 0, "a dog"), row])
    with pytest.raises(DataError) as error:
        RefAvsIndex(tmp_path)
    for word in [str(path), "row 1", "Remedy", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("header", ["vid,uid,split,fid", "vid,uid,split,fid,text", "vid,uid,split,fid,exp,exp", ""])
def test_wrong_columns(tmp_path: Path, header: str) -> None:
    (tmp_path / "metadata.csv").write_text(f"{header}\r\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"metadata\.csv: columns are .* must be .*Remedy"):
        RefAvsIndex(tmp_path)


def test_missing_or_binary_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found.*data.root"):
        RefAvsIndex(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xfe\x00v\x00i")
    with pytest.raises(DataError, match="UTF-8"):
        RefAvsIndex(tmp_path)


def test_uid_is_split_from_the_right() -> None:
    assert split_uid("-_x_y_0_10000_hair-dryer_3") == ("-_x_y_0_10000", "hair-dryer", 3)


def test_truth_of_the_mini_world(tmp_path: Path) -> None:
    write_metadata(tmp_path)
    used = [n for n, row in enumerate(ROWS) if row[2] != "TODO"]
    records = [{"row": n, "kind": "audio", "truth": {"answer": n, "text": "a\u2028b"}} for n in used]
    path = tmp_path / "mini_truth.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    row = RefAvsIndex(tmp_path).rows("test_s")[0]
    assert (row.kind, row.truth["answer"]) == ("audio", 5)

    for broken, words in [
        ([*records[:-1]], "1 rows have no line, the first is row 7"),
        ([*records, records[0]], "line 8: row 0 is unknown or named twice"),
        ([*records[:2], "{oops"], "line 3"),
        ([{"row": 0}], "line 1: KeyError"),
    ]:
        write_lines(path, broken)
        with pytest.raises(DataError, match=words):
            RefAvsIndex(tmp_path)
