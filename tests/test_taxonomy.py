"""Types of failures: which step of a path is wrong first."""

from __future__ import annotations

import pytest

from dataset.annotate.mini import rule_label
from dataset.annotate.taxonomy import TYPES, count_table
from dataset.refavs import Row, Split


def row(number: int = 0, **fields: object) -> Row:
    values = {"vid": "v", "uid": f"c_man_{number}", "clip": "c", "split": Split.TRAIN, "fid": 0, "reference": "It.",
              "class_name": "man", "number": 1, **fields}  # fmt: skip
    return Row(row=number, **values)


TRUTH = {"things": [["red", "dog"], ["blue", "cat"], ["green", "car"]],
         "sounds": [["dog", "loud"], ["cat", "quiet"]], "target": 1}  # fmt: skip
SEEN = "From left to right I see a red dog, a blue cat and a green car."
HEARD = "In the audio I hear the dog first, loud, and then the cat, quiet."
PICKED = "We look for the quieter object: the cat is quieter, so it is in the middle: the blue cat."
ENDING = f"{PICKED} So the target is cat."


@pytest.mark.parametrize(
    ("old", "new", "kind", "label"),
    [
        ("a red dog", "a red drum", "audio", "visual_misidentification"),
        ("a red dog", "a white dog", "audio", "entity_attribute"),
        ("a red dog, a blue cat", "a blue cat, a red dog", "audio", "spatial_referential"),
        ("hear the dog", "hear the car", "audio", "audio_perception"),
        ("the dog first, loud, and then the cat, quiet", "the cat first, quiet, and then the dog, loud", "audio",
         "temporal_reasoning"),
        ("the middle: the blue cat. So the target is cat", "the left: the red dog. So the target is dog", "temporal",
         "temporal_reasoning"),
        ("the middle: the blue cat. So the target is cat", "the left: the red dog. So the target is dog", "spatial",
         "spatial_referential"),
        ("target is cat", "target is dog", "spatial", "logical_contradiction"),
        (HEARD, "", "audio", "logical_contradiction"),
    ],
)  # fmt: skip
def test_rules_name_the_first_wrong_step(old: str, new: str, kind: str, label: str) -> None:
    text = f"{SEEN} {HEARD} {ENDING} It is [SEG]."
    assert old in text
    found = rule_label(row(truth=TRUTH, kind=kind, reference="The quieter object."), text.replace(old, new))
    assert found == label


def test_the_papers_counts_stand_beside_ours() -> None:
    assert [t.paper for t in TYPES] == [428, 285, 251, 103, 166, 148, 124] and sum(t.paper for t in TYPES) == 1505
    assert len({t.family for t in TYPES}) == 3
    table = count_table([("audio_perception", "audio", "dog"), ("audio_perception", "temporal", "cat")])
    assert (table[2]["count"], table[2]["percent"], table[2]["kind:audio"], table[2]["class:cat"]) == (2, 100.0, 1, 1)
