"""Reflective paths (paper eq. 3), their labels, their mixture, and the loss of stage 2 (eq. 7)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dataset.build import training_batches, training_clips
from dataset.prompt import Prompts, load_tokenizer
from dataset.refavs import RefAvsIndex
from dataset.reflective import TRIGGERS, build_path, read_reflective, trigger, without_seg, write_reflective
from model.backbones.videollama2.splice import splice
from model.stages import build_stage
from model.stages.reflective import ReflectiveStage, ignore_before
from scripts import build_reflective
from tests.aurora_cases import WHOLE, run_config, three_clips, tiny_batch, tiny_model, tiny_sample
from tests.data_builders import ROWS, write_lines, write_tokenizer, write_world
from utils.errors import DataError
from utils.types import IGNORE

WRONG = "The man plays. The audio holds a cello. So the target is the cello. It is [SEG]."
RIGHT = "The man plays. The audio holds a man. So the target is the man. It is [SEG]."


def test_a_path_is_wrong_trigger_right() -> None:
    path = build_path(2, "u_man_1", "man", WRONG, RIGHT, seed=0)
    assert path.part("wrong") == WRONG.removesuffix(" It is [SEG].")
    assert path.part("corrected") == RIGHT.removesuffix(" It is [SEG].")
    assert path.part("trigger") in TRIGGERS and "[SEG]" not in path.reasoning
    assert path.reasoning == " ".join(path.part(name) for name in ("wrong", "trigger", "corrected"))


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


def test_faulty_parts_are_refused() -> None:
    with pytest.raises(DataError, match="the wrong path is empty"):
        build_path(2, "u", "man", "It is [SEG].", RIGHT, 0)
    with pytest.raises(DataError, match="ends in 'cello', not in 'man'"):
        build_path(2, "u", "man", WRONG, WRONG, 0)


def make_files(folder: Path) -> tuple[Path, Path]:
    """Two corrections through the command -> (world, reflective.jsonl)."""
    world = write_world(folder / "data", [row for row in ROWS if row[2] == "train"])
    records = [
        {"row": 2, "uid": ROWS[2][1], "target": "man", "wrong": WRONG, "corrected": RIGHT},
        {"row": 0, "uid": ROWS[0][1], "target": "cello", "wrong": RIGHT, "corrected": WRONG},
    ]
    corrections, out = write_lines(folder / "corrections.jsonl", records), folder / "cot" / "reflective.jsonl"
    assert build_reflective.main(["--corrections", str(corrections), "--out", str(out)]) == 0
    return world, out


def test_files_round_trip_and_choose_their_target(tmp_path: Path) -> None:
    world, path = make_files(tmp_path)
    index = RefAvsIndex(world)
    whole, late = read_reflective([path], index), read_reflective([path], index, loss_on="correction")
    alone = read_reflective([path], index, "corrected_only", "correction")
    assert list(whole) == [0, 2] and whole[2].loss_from == 0
    assert late[2].reasoning == whole[2].reasoning
    assert late[2].reasoning[late[2].loss_from :] == RIGHT.removesuffix(" It is [SEG].") == alone[2].reasoning
    assert alone[2].loss_from == 0


def test_faulty_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, path = make_files(tmp_path)
    good = json.loads(path.read_text().splitlines()[0])
    bad = [
        {**good, "spans": {"wrong": [0, 3]}},
        {**good, "spans": {**good["spans"], "trigger": [5, 2]}},
        {**good, "target": "dog"},
        good,
        good,
    ]
    with pytest.raises(DataError) as error:
        read_reflective([write_lines(tmp_path / "bad.jsonl", bad)])
    text = str(error.value)
    assert "4 faulty reflective records" in text and "line 1: spans must name" in text
    assert "line 2: spans.trigger" in text
    assert "line 3: the path does not end in the target 'dog'" in text and "line 5: row 0 is given twice" in text
    with pytest.raises(DataError, match="no record"):
        read_reflective([write_lines(tmp_path / "empty.jsonl", [])])
    lines = write_lines(tmp_path / "c.jsonl", [{"row": 1}])
    assert build_reflective.main(["--corrections", str(lines), "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "c.jsonl, line 1: KeyError('uid')" in capsys.readouterr().err


# ---- labels


def test_labels_before_the_start_are_ignored() -> None:
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([1])]
    answers = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
    for side in ("right", "left"):
        packed = splice(prompts, answers, 0, 0, 99, padding_side=side)
        late = ignore_before(packed, [2, 0])
        assert [row[row != IGNORE].tolist() for row in late.labels] == [[7, 8], [9, 10]]
        assert late.token_ids is packed.token_ids and packed.labels[0].tolist().count(IGNORE) < 4
    with pytest.raises(ValueError, match=r"row 1: start 2, but the answer has tokens 0\.\.1"):
        ignore_before(packed, [0, 2])
    with pytest.raises(ValueError, match="2 rows, 1 starts"):
        ignore_before(packed, [0])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(*load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))), "none")


def test_answer_start_is_the_first_token_of_the_correction(prompts: Prompts) -> None:
    path = build_path(2, "u_man_1", "man", WRONG, RIGHT, seed=0)
    first = path.spans["corrected"][0]
    ids = prompts.answer_ids("reasoning", "man", path.reasoning)
    start = prompts.answer_start(path.reasoning, first)
    tail = prompts._plain.decode(ids[start:-3].tolist())
    assert tail.strip() == path.reasoning[first:] + " It is"
    assert prompts.answer_start(path.reasoning, 0) == 0


# ---- mixture


def reflective_config(world: Path, path: Path, cot: Path, **options: object) -> object:
    data = {"root": str(world), "cot": (str(cot),), "answer": "reasoning", "num_workers": 0, "num_frames": 2}
    return run_config(
        "reflective",
        init_from="x",
        data=data,
        reflective={"paths": (str(path),), "reflective_count": 1, "standard_count": 3, **options},
        engine={"micro_batch": 2, "precision": "fp32", "gradient_checkpointing": False},
    )


def test_sources_are_mixed_by_count_and_seed(tmp_path: Path, prompts: Prompts) -> None:
    world, path = make_files(tmp_path)
    rows = [row for row in ROWS if row[2] == "train"]
    cot = write_lines(tmp_path / "cot.jsonl", [
        {"row": i, "uid": row[1], "reasoning": "So the target is it.", "target": "it"} for i, row in enumerate(rows)
    ])  # fmt: skip
    processor = SimpleNamespace()
    config = reflective_config(world, path, cot, loss_on="correction")
    clips = training_clips(config, processor, prompts)
    assert [len(source) for source in clips.datasets] == [2, 4]
    assert clips.datasets[0].rows[1].row == 2 and clips.datasets[0]._label_start(clips.datasets[0].rows[1]) > 5
    orders = [training_batches(config, clips).sampler.members.tolist() for _ in range(2)]
    assert orders[0] == orders[1] and sum(i < 2 for i in orders[0]) == 1 and len(orders[0]) == 4
    with pytest.raises(DataError, match="reflective.standard_count = 9, but there are 4 records"):
        training_batches(reflective_config(world, path, cot, standard_count=9), clips)


@pytest.mark.parametrize("answer", ["reasoning", "plain"])
def test_table_2_trains_with_and_without_reasoning_on_the_same_rows(
    answer: str, tmp_path: Path, prompts: Prompts
) -> None:
    world, _ = make_files(tmp_path)
    rows = [row for row in ROWS if row[2] == "train"]
    cot = write_lines(tmp_path / "cot.jsonl", [
        {"row": i, "uid": rows[i][1], "reasoning": "So the target is it.", "target": "it"} for i in (0, 2)
    ])  # fmt: skip
    data = {"root": str(world), "cot": (str(cot),), "answer": answer, "num_workers": 0}
    alone = {"loss": {"distill": 0.0}, "sft": {"freeze_mask_decoder": False, "student_start": "init_from"}}
    config = run_config("sft", data={**data, "incomplete_reasoning": "drop"}, **alone)
    assert [row.row for row in training_clips(config, SimpleNamespace(), prompts).rows] == [0, 2]
    whole = run_config("sft", data=data, **alone)
    with pytest.raises(DataError, match="2 of 4 rows have no reasoning"):
        training_clips(whole, SimpleNamespace(), prompts)


# ---- loss


def test_loss_is_eq_7_on_the_labelled_tokens() -> None:
    """CE of the tokens from `label_start` on; masks as in every supervised stage; no distillation."""
    model = tiny_model(WHOLE).train()
    config = run_config("reflective", init_from="x", reflective={"paths": ("r.jsonl",)}, data={
        "answer": "reasoning", "cot": ("cot.jsonl",)})  # fmt: skip
    stage = build_stage(config, model)
    assert isinstance(stage, ReflectiveStage)
    batch = three_clips()
    starts = [2, 0, 1]
    late = tiny_batch(*(replace(s, label_start=n) for s, n in zip(batch.samples, starts, strict=True)))
    step, whole = stage.loss(stage.prepare(late)), stage.loss(stage.prepare(batch))
    tokens = []
    for sample, start in zip(batch.samples, starts, strict=True):
        one = tiny_batch(sample)
        output = model(model.pack(one, one.answers), model.encode(one))
        tokens.append(F.cross_entropy(output.answer_logits, sample.answer_ids, reduction="none")[start:])
    assert step.parts["ce_loss"].item() == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-4)
    assert step.parts["mask_loss"].item() == pytest.approx(whole.parts["mask_loss"].item(), rel=1e-5)
    assert step.parts["ce_loss"].item() != pytest.approx(whole.parts["ce_loss"].item(), rel=1e-4)
    assert "distill_loss" not in step.parts
    step.total.backward()


def test_written_paths_are_sorted(tmp_path: Path) -> None:
    paths = [build_path(row, f"u{row}_man_1", "man", WRONG, RIGHT, 0) for row in (7, 3)]
    write_reflective(tmp_path / "r.jsonl", paths)
    assert [json.loads(line)["row"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == [3, 7]
    assert tiny_sample(0).label_start == 0


RELEASED = {
    0: (f"{WRONG} Wait, let me re-evaluate… {RIGHT.replace('man.', 'cello.')}", ""),
    1: ("The man plays. So the target is the man. But is that right? Let me check. So the target is the violin.", ""),
    2: (RIGHT, "no sentence opens as a trigger does"),
    3: ("Wait, let me look. So the target is the null.", "no target is named before the trigger"),
}


def test_the_released_list_is_split_or_said_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = RefAvsIndex(write_world(tmp_path / "data", seconds=0.1))
    rows = index.rows("train")
    texts = {row.row: RELEASED[i][0].replace("violin", row.class_name) for i, row in enumerate(rows)}
    texts[rows[0].row] = texts[rows[0].row].replace("the cello.", f"the {rows[0].class_name}.")
    (tmp_path / "list.json").write_text(json.dumps([{"reasoning": text} for text in texts.values()]))
    arguments = ["--import-published", str(tmp_path / "list.json"), "--out", str(tmp_path / "out.jsonl")]
    assert build_reflective.main([*arguments, "--data", str(tmp_path / "data")]) == 0
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
    (tmp_path / "list.json").write_text(json.dumps([RIGHT]))
    assert build_reflective.main([*arguments, "--data", str(tmp_path / "data")]) == 1
    assert "1 elements, but split train has 4 rows" in capsys.readouterr().err
