"""The data engine without a network: gates, corrections, failures, types, rate, the mini world's own annotator."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.annotate.backends import Blocked, Reply, Request, Unanswered, redacted
from dataset.annotate.correction import correction_gate, edit_ratio, parse_correction, split_parts, unmark
from dataset.annotate.engine import Engine, Limits, RunFiles
from dataset.annotate.failures import mine, read_failures, write_failures
from dataset.annotate.gates import problems_of_reasoning, reasoning_gate, tidy
from dataset.annotate.mini import mark_changes, rule_label
from dataset.annotate.prompts import fill, read_template
from dataset.annotate.taxonomy import TYPES, count_table
from dataset.mini.language import chain_is_faithful
from dataset.mini.world import WorldSettings, make_mini_world
from dataset.records import CotRecord, read_cot, read_reflective
from dataset.refavs import RefAvsIndex, Row, Split
from scripts import analyze_failures, build_reflective, correct_paths, generate_cot
from tests.data_builders import write_lines
from utils.errors import DataError
from utils.results import encode_masks

GOOD = "The images show a man. The audio contains his voice. The reference asks for the speaker. So the target is man."


def row(number: int = 0, **fields: object) -> Row:
    return replace(Row(number, "v", f"c_man_{number}", "c", Split.TRAIN, 0, "It.", "man", 1), **fields)


def request(number: int = 0, wrong: str = "") -> Request:
    return Request(row(number), "prompt", (), Path("a.wav"), wrong)


# ---- gates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, ()),
        (GOOD.replace("man.", "cat."), ("wrong_target",)),
        (GOOD.replace("The audio contains his voice. ", ""), ("no_audio_step",)),
        (GOOD.replace("The images show", "I like"), ("no_video_step",)),
        (GOOD.replace("reference asks for", "matter is"), ("no_reference_step",)),
        (GOOD + " And more.", ("no_ending",)),
        (GOOD.replace("So", "As the given target says, so"), ("leaks_the_answer",)),
        (GOOD.replace("So", "So " * 900), ("too_long",)),
        ("", ("empty", "no_video_step", "no_audio_step", "no_reference_step", "no_ending", "wrong_target")),
    ],
)
def test_gates_of_written_reasoning(text: str, expected: tuple[str, ...]) -> None:
    assert problems_of_reasoning(text, "man", "flexible") == expected


def test_fixed_format_needs_its_five_points() -> None:
    fixed = f"Reasoning: 1) a 2) b 3) c 4) d 5) {GOOD}"
    assert problems_of_reasoning(fixed, "man", "fixed") == ()
    assert problems_of_reasoning(GOOD, "man", "fixed") == ("not_fixed_format",)


@pytest.mark.parametrize(
    "ending",
    ["the correct target is ”man”.", 'the target is "man"', "the target is **man**.", "the target is man. It is [SEG]"],
)
def test_replies_are_tidied(ending: str) -> None:
    assert tidy(f"Reasoning:\nThe images show a man,  so {ending}", "flexible").endswith("a man, so the target is man.")


# ---- corrections


WRONG = 'The sign says "stop". The audio holds a drum. So the target is drum. It is [SEG].'
REPLY = (
    '**(1) The original LVLM\'s answer:** The sign says "stop". The audio holds a "drum". So the target is "drum".\n'
    '**(2) Your corrected answer:** The sign says "stop". The audio holds a “man speaking”. So the target is "man".'
)


def test_two_part_answers_are_parsed() -> None:
    found = parse_correction(REPLY, WRONG)
    assert found.corrected == 'The sign says "stop". The audio holds a man speaking. So the target is man.'
    assert [found.corrected[a:b] for a, b in found.corrected_spans] == ["man speaking", "man"]
    assert [found.wrong[a:b] for a, b in found.wrong_spans] == ["drum", "drum"]
    assert found.edit_ratio == pytest.approx(3 / 15)


@pytest.mark.parametrize("text", ["right", '"Right."', " **right** \n"])
def test_right_is_kept_apart(text: str) -> None:
    judge = correction_gate(0.6)
    result = judge(request(wrong=WRONG), text)
    assert result.status == "right" and result.record["target"] == "man"
    assert judge(request(wrong=WRONG), "the right one").status == "refused"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("The target is man.", "no_two_parts"),
        ("(1) a", "no_two_parts"),
        ("(2) b (1) a", "no_two_parts"),
        (REPLY + ' "', "marks_not_closed"),
        (REPLY.replace('"man"', '"cat"'), "wrong_target"),
        (f"(1) x (2) {GOOD}", "not_minimal"),
    ],
)
def test_faulty_corrections_are_refused(text: str, problem: str) -> None:
    result = correction_gate(0.6)(request(wrong=WRONG), text)
    assert result.status == "refused" and result.problems == (problem,)


def test_marks_and_ratios() -> None:
    assert unmark('a "b c" d “e”.') == ("a b c d e.", ((2, 5), (8, 9)))
    assert split_parts("(1) one (2) two") == ("one", "two")
    assert (edit_ratio("a b c", "a b c"), edit_ratio("a b", "c d"), edit_ratio("", "a")) == (0, 1, 1)
    assert mark_changes("a b c", "a x c d") == ('a "b" c', 'a "x" c "d"')


# ---- prompts, secrets


def test_templates_are_filled_in_one_pass(tmp_path: Path) -> None:
    text = fill(read_template("correct"), reference="{target}", target="cat", wrong="w {reference}")
    assert "Reference: {target}\n" in text and "answer: w {reference}\n" in text and "result: cat" in text
    for name in ("cot_flexible", "cot_fixed"):
        assert "the target is cat." in fill(read_template(name), reference="r", target="cat")
    own = tmp_path / "own.txt"
    own.write_text("{reference} {wrong}")
    with pytest.raises(DataError, match="asks for wrong"):
        fill(read_template("cot_flexible", own), reference="r", target="t")
    own.write_text("no slot")
    with pytest.raises(DataError, match="has no {reference}"):
        read_template("correct", own)


PAPER_PROMPTS = {
    "paper_6_1": "83acf25c25995dfaf884b9233483e4d87c3d90c7b7ce57e450a0182e105789cc",
    "paper_6_2": "b40de655956f151996895083a5357058a9cf50a32f11241c191a8824441da916",
}
"""SHA-256 of the texts in sections 6.1 and 6.2, the places of reference and target printed as xxxxxx and xxxxx."""


@pytest.mark.parametrize("name", PAPER_PROMPTS)
def test_the_paper_s_prompts_are_shipped_word_for_word(name: str) -> None:
    text = read_template(name).split("\nReference: {reference}\nThe LVLM’s answer: ")[0]
    text = text.replace("{reference}", "xxxxxx").replace("{target}", "xxxxx")
    assert hashlib.sha256(text.encode()).hexdigest() == PAPER_PROMPTS[name]
    assert read_template("correct", Path(name)) == read_template(name)


@pytest.mark.parametrize("name", ["cot_flexible", "paper_6_1"])
def test_reasoning_is_written_by_the_named_prompt(world: Path, tmp_path: Path, name: str) -> None:
    given = ["--data", str(world), "--limit", "2", "--mistakes", "0", "--out", str(tmp_path / "train.jsonl")]
    assert generate_cot.main([*given, *(["--template", name] if name != "cot_flexible" else [])]) == 0
    settings = json.loads((tmp_path / "train.jsonl.parts/settings.json").read_text())
    assert settings["prompt_sha256"] == hashlib.sha256(read_template(name).encode()).hexdigest()[:16]


def test_secrets_are_cut_out() -> None:
    assert redacted(ValueError("Bearer abc\nfailed abc"), "abc", None) == "ValueError: Bearer <key> failed <key>"


# ---- engine


class Scripted:
    """Answers each row from its list of replies and errors, and keeps the moments at which it was asked."""

    def __init__(self, *plans: list) -> None:
        self.plans, self.asked = plans, []

    def answer(self, request: Request) -> Reply:
        self.asked.append((request.row.row, time.monotonic()))
        found = self.plans[request.row.row].pop(0)
        if isinstance(found, Exception):
            raise found
        return Reply(found, 100, 10)


def run(folder: Path, backend: Scripted, **limits: object) -> Engine:
    """An engine after one run over the rows of the backend."""
    files = RunFiles(folder / "out.jsonl", {})
    engine = Engine(backend, reasoning_gate("flexible"), Limits(**limits), files)
    settled = files.settled()
    engine.run([request(n) for n in range(len(backend.plans)) if n not in settled], len(settled))
    return engine


def test_half_answers_and_refusals_are_tried_again_and_the_rest_stays_open(tmp_path: Path, capsys) -> None:
    half, down = Unanswered("cut", ask_again=True), Unanswered("status 503")
    backend = Scripted([GOOD], ["", half, GOOD], [half, half, half], [down], ["bad"] * 3, [Blocked("safety")])
    engine = run(tmp_path, backend, concurrency=2)
    assert engine.unanswered == {2: "cut", 3: "status 503"} and not any(backend.plans)
    settled = engine.files.settled()
    assert {n: (r["status"], r["attempts"]) for n, r in settled.items()} == {
        0: ("accepted", 1), 1: ("accepted", 3), 4: ("refused", 3), 5: ("blocked", 1)
    }  # fmt: skip
    assert settled[1]["problems"][0] == "empty" and settled[4]["reply"] == "bad"
    assert set(engine.files.settled(again=True)) == {0, 1}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("6/6 ") and "row 3 c_man_3: open, status 503" in "".join(lines)
    engine = run(tmp_path, Scripted([], [], [GOOD], [GOOD], [], []))
    assert engine.unanswered == {} and len(engine.files.settled()) == 6
    assert engine.files.spent == {"replies": 8, "tokens_in": 800, "tokens_out": 80, "usd": 0.0}


def test_starts_keep_their_distance(tmp_path: Path) -> None:
    backend, begun = Scripted([GOOD], ["", GOOD], [GOOD]), time.monotonic()
    run(tmp_path, backend, concurrency=3, per_minute=600)
    waited = sorted(moment - begun for _, moment in backend.asked)
    assert len(waited) == 4 and all(seconds >= 0.1 * n for n, seconds in enumerate(waited))


# ---- mining


def line(number: int, j: float, answer: str | None, **fields: object) -> dict:
    return {"row": number, "uid": f"u{number}", "reference": "r", "kind": "audio", "class_name": "man", "J": j,
            "answer_class": answer, "reasoning": "text", **fields}  # fmt: skip


def test_only_clear_failures_are_mined(tmp_path: Path) -> None:
    masks = np.zeros((4, 6, 8), bool)
    masks[0] = True
    null = {"class_name": "null", "J": None, "masks": encode_masks(masks)}
    lines = [
        line(0, 59.9, "cat"), line(1, 60.0, "cat"), line(2, 10.0, "man"), line(3, 10.0, None),
        line(4, 0, "cat", **null), line(5, 0, "cat", **{**null, "masks": encode_masks(masks & False)}),
    ]  # fmt: skip
    found = mine(lines)
    assert [(f.row, f.iou) for f in found] == [(0, 0.599), (3, 0.1)]
    assert [f.iou for f in mine(lines, 0.8)][-1] == 0.75
    report = write_failures(write_lines(tmp_path / "predictions.jsonl", lines), tmp_path / "out.jsonl")
    assert report["mined_percent"] == 33.333 and report["unreadable"] == 1
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report
    assert read_failures(tmp_path / "out.jsonl") == found
    assert report["by_kind"] == {"audio": {"rows": 6, "mined": 2}}


# ---- types of failures: which step of a path is wrong first


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


# ---- the mini world annotates itself


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "world"
    settings = WorldSettings(train=6, val=1, test_s=1, test_u=1, test_n=0, train_null=2)
    make_mini_world(root, settings, progress=False)
    return root


@pytest.mark.parametrize("style", ["flexible", "fixed"])
def test_written_chains_are_true_and_come_once(world: Path, tmp_path: Path, style: str) -> None:
    out = tmp_path / "cot.jsonl"
    given = ["--data", str(world), "--out", str(out), "--style", style, "--mistakes", "0.4"]
    assert generate_cot.main([*given, "--limit", "20"]) == 0
    Path(f"{out}.parts/rank0.jsonl").write_bytes(Path(f"{out}.parts/rank0.jsonl").read_bytes()[:-30])
    assert generate_cot.main(given) == 0
    index = RefAvsIndex(world)
    rows = index.rows("train")
    records = read_cot([out], index)
    refused = [json.loads(text) for text in Path(f"{out}.refused.jsonl").read_text().splitlines()]
    assert sorted([*records, *(r["row"] for r in refused)]) == [r.row for r in rows]
    assert len(refused) < len(rows) / 4 and all(r["problems"] for r in refused)
    assert style == "fixed" or all_true(index, records)


def all_true(index: RefAvsIndex, records: dict[int, CotRecord]) -> bool:
    rows = ((index.row(n), f"{record.reasoning} It is [SEG].") for n, record in records.items())
    return all(chain_is_faithful(text, row.truth, row.reference) for row, text in rows)


def spoil(text: str, target: str) -> str:
    """A chain that names another class at its end."""
    head = text.rsplit("the target is", 1)[0]
    return f"{head}the target is {'cat' if target != 'cat' else 'dog'}. It is [SEG]."


def test_from_failures_to_reflective_paths(world: Path, tmp_path: Path) -> None:
    index = RefAvsIndex(world)
    truths = read_cot([world / "cot" / "train.jsonl"], index)
    failures = write_lines(tmp_path / "failures.jsonl", [
        {"row": n, "uid": r.uid, "reference": index.row(n).reference, "kind": index.row(n).kind, "target": r.target,
         "answer_class": "x", "iou": 0.0, "path": spoil(r.reasoning, r.target)} for n, r in truths.items()
    ])  # fmt: skip
    common = ["--data", str(world), "--failures", str(failures), "--backend", "mini"]
    out, paths, types = (tmp_path / name for name in ("corrections.jsonl", "reflective.jsonl", "types.jsonl"))
    assert correct_paths.main([*common, "--out", str(out), "--mistakes", "0.3"]) == 0
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["accepted"] + report["right"] + report["refused"] == len(truths) == report["rows"]
    assert report["accepted"] > 0.6 * len(truths) and report["refusals_by_gate"]
    assert build_reflective.main(["--corrections", str(out), "--out", str(paths)]) == 0
    built = read_reflective([paths], index, "corrected_only")
    assert len(built) == report["accepted"] and all_true(index, built)
    assert analyze_failures.main([*common, "--out", str(types)]) == 0
    assert {json.loads(text)["type"] for text in types.read_text().splitlines()} == {"logical_contradiction"}


def test_released_lists_are_imported(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = RefAvsIndex(world).rows("train")
    released = tmp_path / "train.json"
    released.write_text(json.dumps([{"reasoning": f"So the target is {r.class_name}. It is [SEG]."} for r in rows]))
    given = ["--data", str(world), "--out", str(tmp_path / "o.jsonl"), "--import-published", str(released)]
    assert generate_cot.main(given) == 0 and len(read_cot([tmp_path / "o.jsonl"], RefAvsIndex(world))) == len(rows)
    released.write_text("[]")
    given[3] = str(tmp_path / "p.jsonl")
    assert generate_cot.main(given) == 1
    assert f"0 elements, but split train has {len(rows)} rows" in capsys.readouterr().err
