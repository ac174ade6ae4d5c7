"""The mini world: deterministic, in the official layout, every reference with one answer, chains that are true."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.mini import language as language
from dataset.mini import scene as scenes
from dataset.mini.world import WorldSettings, make_mini_world
from dataset.refavs import RefAvsIndex

SMALL = WorldSettings(train=6, val=2, test_s=4, test_u=3, test_n=2, train_null=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "world"
    make_mini_world(root, SMALL, progress=False)
    return root


def _digest(root: Path) -> str:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_regeneration_is_byte_identical_and_a_seed_changes_it(world: Path, tmp_path: Path) -> None:
    make_mini_world(tmp_path / "again", SMALL, workers=2, progress=False)
    assert _digest(tmp_path / "again") == _digest(world)
    other = WorldSettings(**{**SMALL.__dict__, "seed": 1})
    make_mini_world(tmp_path / "other", other, progress=False)
    assert _digest(tmp_path / "other") != _digest(world)


def test_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a mini world"):
        make_mini_world(tmp_path, SMALL, progress=False)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_layout_is_read_by_the_official_index(world: Path) -> None:
    index = RefAvsIndex(world)
    assert len(index.rows("test_s")) == 4 * 3
    assert len(index.rows("test_n")) == 2 * 4
    assert all(row.class_name == "null" and row.clip.startswith("null_") for row in index.rows("test_n"))
    unseen = {row.clip for row in index.rows("test_u") if row.class_name in scenes.UNSEEN_CLASSES}
    assert unseen == {row.clip for row in index.rows("test_u")}
    assert not {row.class_name for row in index.rows("train")} & set(scenes.UNSEEN_CLASSES)


def test_masks_are_binary_and_null_masks_empty(world: Path) -> None:
    values = set()
    for path in sorted((world / "gt_mask").rglob("*.png")):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        values |= set(np.unique(mask).tolist())
        assert ("null_" in str(path)) == (mask.max() == 0)
    assert values == {0, 255}


def test_chains_are_keyed_by_row_and_true(world: Path) -> None:
    with open(world / "metadata.csv", newline="") as file:
        table = list(csv.DictReader(file))
    facts = [json.loads(line) for line in (world / "mini_truth.jsonl").read_text().splitlines()]
    chains = [json.loads(line) for line in (world / "cot" / "train.jsonl").read_text().splitlines()]
    assert [c["uid"] for c in chains] == [table[c["row"]]["uid"] for c in chains]
    assert len(chains) == sum(row["split"] == "train" for row in table)
    for chain in chains:
        reference = table[chain["row"]]["exp"]
        assert language.chain_is_faithful(chain["reasoning"] + " It is [SEG].", facts[chain["row"]]["truth"], reference)


def test_every_reference_has_one_answer_and_kinds_are_common() -> None:
    counts = dict.fromkeys(language.KINDS, 0)
    shared_class = shared_colour = 0
    for i in range(300):
        scene = scenes.make_scene((5, i))
        asked: dict[str, int] = {}
        for question in language.questions(scene):
            assert asked.setdefault(question.reference, question.target) == question.target
            counts[question.kind] += 1
        shared_class += len({t.class_name for t in scene.things}) < 3
        shared_colour += len({t.colour for t in scene.things}) < 3
    assert min(counts.values()) > 150
    assert 90 < shared_class < 180
    assert shared_colour > 75


def test_a_false_step_is_not_faithful() -> None:
    scene = next(s for s in (scenes.make_scene((6, i)) for i in range(50)) if len(s.sounds) == 2)
    question = next(q for q in language.questions(scene) if q.kind == "temporal")
    chain = language.reasoning(scene, question, question.reference, np.random.default_rng(0)) + " It is [SEG]."
    truth = language.truth(scene, question)
    assert language.chain_is_faithful(chain, truth, question.reference)
    things, (first, second) = scene.things, scene.sounds
    wrong = {
        "seen": chain.replace(things[0].name, f"{things[0].colour} tuba", 1),
        "heard": chain.replace("loud", "?").replace("quiet", "loud").replace("?", "quiet"),
        "reference": chain.replace(language.clause(question.reference), "the silent object"),
        "answer": chain.replace(f"target is {things[question.target].class_name}", "target is sheep"),
        "truncated": chain.split(".")[0] + ".",
    }
    for step, text in wrong.items():
        assert not language.chain_is_faithful(text, truth, question.reference), step
    assert first[0] != second[0]


def test_sound_matches_the_scene() -> None:
    """Before its onset a class is silent; a muted clip holds only the room's noise."""
    scene = next(s for s in (scenes.make_scene((7, i)) for i in range(80)) if len(s.sounds) == 2)
    onsets = sorted({(t.onset, t.class_name) for t in scene.things if t.amplitude > 0})
    wave = scenes.render_audio(scene)
    assert wave.dtype == np.float32 and wave.shape == (scenes.SECONDS * scenes.SAMPLE_RATE,)
    assert [name for _, name in onsets] == [name for name, _ in scene.sounds]
    start = int(onsets[0][0] * scenes.SAMPLE_RATE)
    assert start == 0 or np.abs(wave[:start]).max() < 0.05
    assert np.abs(wave[start : start + 8000]).max() > 0.05
    assert np.sqrt(np.mean(scenes.render_audio(scene, muted=True) ** 2)) == pytest.approx(0.004, rel=0.05)
