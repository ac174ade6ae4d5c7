"""Stage 2 on reflective paths (paper eq. 3): labels, the mixture of sources, and the loss (eq. 7)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dataset.loader import training_batches, training_clips
from dataset.prompt import Prompts, load_tokenizer
from dataset.records import build_path
from model.backbones.videollama2.splice import splice
from model.stages import build_stage
from model.stages.reflective import ReflectiveStage, ignore_before
from tests.aurora_cases import WHOLE, run_config, three_clips, tiny_batch, tiny_model, tiny_sample
from tests.data_builders import (
    RIGHT_PATH,
    TRAIN_ROWS,
    WRONG_PATH,
    write_reasoning,
    write_reflective_files,
    write_tokenizer,
)
from utils.errors import DataError
from utils.types import IGNORE

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
    path = build_path(2, "u_man_1", "man", WRONG_PATH, RIGHT_PATH, seed=0)
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
    world, path = write_reflective_files(tmp_path)
    cot, processor = write_reasoning(tmp_path / "cot.jsonl"), SimpleNamespace()
    config = reflective_config(world, path, cot, loss_on="correction")
    clips = training_clips(config, processor, prompts)
    assert [len(source) for source in clips.datasets] == [2, 4]
    first = clips.datasets[0]
    assert first.rows[1].row == 2 and first._label_start(first.records[1]) > 5
    orders = [training_batches(config, clips).sampler.members.tolist() for _ in range(2)]
    assert orders[0] == orders[1] and sum(i < 2 for i in orders[0]) == 1 and len(orders[0]) == 4
    with pytest.raises(DataError, match="reflective.standard_count = 9, but there are 4 records"):
        training_batches(reflective_config(world, path, cot, standard_count=9), clips)


@pytest.mark.parametrize("answer", ["reasoning", "plain"])
def test_table_2_trains_with_and_without_reasoning_on_the_same_rows(
    answer: str, tmp_path: Path, prompts: Prompts
) -> None:
    world, _ = write_reflective_files(tmp_path)
    cot = write_reasoning(tmp_path / "cot.jsonl", [TRAIN_ROWS[0], None, TRAIN_ROWS[2]])
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
    assert tiny_sample(0).label_start == 0
