"""scripts/check_data.py: a sound world passes, planted faults are found by name, a table of the real size is quick."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile

from scripts import check_data
from scripts.check_data import KINDS, check_table
from tests.data_builders import ROWS, write_lines, write_metadata, write_world

CLIP, NULL = "-a_b_0_10000", "null_m--a_b_0_10000"
TRAIN = [(n, row) for n, row in enumerate(ROWS) if row[2] == "train"]


@pytest.fixture(scope="module")
def sound_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("doctor") / "data", frames=3, seconds=1.0)
    _records(root, [_record(n, row) for n, row in TRAIN])
    return root


@pytest.fixture
def world(sound_world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_world, tmp_path / "data"))


def _record(number: int, row: tuple) -> dict:
    return {"row": number, "uid": row[1], "reasoning": "I see it.", "target": row[1].rsplit("_", 2)[1]}


def _records(root: Path, records: list) -> None:
    (root / "cot").mkdir(exist_ok=True)
    write_lines(root / "cot" / "train.jsonl", records)


def examine(root: Path, *options: str, workers: int = 0) -> tuple[int, dict]:
    """Exit status and report."""
    path = root.parent / "report.json"
    status = check_data.main(["--data", str(root), "--json", str(path), "--workers", str(workers), *options])
    return status, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def test_sound_world_passes_in_another_process(sound_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in sound_world.rglob("*")}
    status, report = examine(sound_world, workers=1)
    assert status == 0 and report["counts"] == {"error": 0, "warning": 0, "note": 3}, report
    assert report["kinds"] == {"doubled uid": 1, "unused split": 1, "null leak": 1}
    assert report["checked"] == {"rows": 8, "clips": 5, "frames": 15, "masks": 18, "sounds": 5}
    assert "errors: 0, warnings: 0, notes: 3" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in sound_world.rglob("*")}
    assert examine(sound_world, workers=0)[1]["findings"] == report["findings"]


def _frame(root: Path, number: int) -> Path:
    return root / "media" / CLIP / "frames" / f"{number}.jpg"


def _mask(root: Path, number: int, fid: int = 0) -> Path:
    return root / "gt_mask" / CLIP / f"fid_{fid}" / f"{number:05d}.png"


def _sound(root: Path, wave: np.ndarray) -> None:
    soundfile.write(root / "media" / CLIP / "audio.wav", wave.astype(np.float32), 16_000, subtype="FLOAT")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _null_object(root: Path) -> None:
    shutil.copytree(root / "gt_mask" / CLIP / "fid_0", root / "gt_mask" / NULL / "fid_0")


def _still(root: Path) -> None:
    for number in (1, 2):
        shutil.copy(_frame(root, 0), _frame(root, number))


def _empty(root: Path) -> None:
    for number in range(3):
        cv2.imwrite(str(_mask(root, number, 1)), np.zeros((48, 64), np.uint8))


def _link(root: Path) -> None:
    shutil.move(root / "media" / CLIP, root.parent / "elsewhere")
    (root / "media" / CLIP).symlink_to(root.parent / "elsewhere")


def _cello(root: Path, **changes: object) -> None:
    _records(root, [{**_record(*TRAIN[0]), **changes}, *[_record(n, row) for n, row in TRAIN[1:]]])


TONE = np.sin(np.arange(16_000) / 5)
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "frame missing": ("missing", lambda r: _frame(r, 1).unlink(), "image 1 is missing"),
    "frames missing": ("missing", lambda r: shutil.rmtree(_frame(r, 1).parent), "no such folder"),
    "sound missing": ("missing", lambda r: (r / "media" / CLIP / "audio.wav").unlink(), "audio.wav"),
    "mask missing": ("missing", lambda r: _mask(r, 2).unlink(), "2 masks for 3 frames"),
    "masks missing": ("missing", lambda r: shutil.rmtree(r / "gt_mask" / CLIP / "fid_1"), "fid_1"),
    "frame truncated": ("broken", lambda r: _cut(_frame(r, 1)), "truncated"),
    "mask truncated": ("broken", lambda r: _cut(_mask(r, 1)), "truncated"),
    "sound truncated": ("broken", lambda r: (r / "media" / CLIP / "audio.wav").write_bytes(b"RIFF"), "audio.wav"),
    "frame size": ("wrong size", lambda r: cv2.imwrite(str(_frame(r, 1)), np.zeros((9, 9, 3), np.uint8)), "9x9"),
    "mask size": ("wrong size", lambda r: cv2.imwrite(str(_mask(r, 1)), np.zeros((9, 9), np.uint8)), "9x9"),
    "mask values": ("mask values", lambda r: cv2.imwrite(str(_mask(r, 1)), np.full((48, 64), 7, np.uint8)), "[7]"),
    "null object": ("object of a null row", _null_object, "marks an object"),
    "link out": ("outside", _link, "leads out of"),
    "silent": ("silent sound", lambda r: _sound(r, 0 * TONE), "peak 0"),
    "clipped": ("clipped sound", lambda r: _sound(r, (5 * TONE).clip(-1, 1)), "at full scale"),
    "short": ("sound length", lambda r: _sound(r, TONE[:8000] / 2), "0.5 s, most clips have 1"),
    "still": ("still frames", _still, "3 equal frames"),
    "empty mask": ("empty mask", _empty, "all 3 masks are empty"),
    "no row": ("reasoning", lambda r: _cello(r, row=99), "row 99 does not exist"),
    "no JSON": ("reasoning", lambda r: _records(r, ["{oops"]), "malformed JSON"),
    "wrong target": ("reasoning target", lambda r: _cello(r, target="dog"), "is about 'cello'"),
    "no record": ("no reasoning", lambda r: _records(r, []), "4 rows have no record"),
    "bad row": ("table", lambda r: write_metadata(r, [*ROWS, ("v", "../x_dog_1", "val", 0, "a")]), "one folder"),
    "two splits": ("split leak", lambda r: write_metadata(r, [*ROWS, (CLIP, f"{CLIP}_cello_2", "val", 0, "A")]), "val"),
    "two names": (
        "two classes of one object",
        lambda r: write_metadata(r, [*ROWS, (CLIP, f"{CLIP}_violin_2", "train", 0, "A")]),
        "cello, violin",
    ),
    "placeholder": (
        "placeholder text",
        lambda r: write_metadata(r, [*ROWS, (CLIP, f"{CLIP}_cello_2", "train", 0, "NO.")]),
        "NO.",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(world: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, plant, words = FAULTS[name]
    plant(world)
    status, report = examine(world)
    found = [f for f in report["findings"] if f["kind"] == kind]
    if name == "null object":
        assert report["kinds"][kind] == len(found) == 1 and status == 0  # the loader reads it as empty and goes on
    assert found and any(words in f["text"] + f["where"] for f in found), report["findings"]
    severity, advice = KINDS[kind]
    assert status == (1 if severity == "error" else 0) and found[0]["advice"] == advice
    assert kind in capsys.readouterr().out


def test_what_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(tmp_path)[0] == 2 and "metadata.csv: not found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check_data.main(["--data", str(tmp_path), "--fix"])


def test_table_of_the_real_size_takes_seconds(tmp_path: Path) -> None:
    names = ("cello", "hair-dryer", "man")
    rows = [
        (f"v{n // 6}_0_10000", f"v{n // 6}_0_10000_{names[n % 3]}_{n % 2}", "train", n % 3, f"The thing {n % 977}.")
        for n in range(20_459)
    ]
    write_metadata(tmp_path / "data", rows)
    status, report = examine(tmp_path / "data", "--metadata-only")
    assert status == 0 and report["checked"] == {"rows": 20_459} and report["seconds"]["table"] < 10


def test_known_oddities_are_notes(world: Path) -> None:
    _, found = check_table(world)
    assert {f.severity for f in found} == {"note"} and found[0].rows == (6, 7)
