"""The sections of single stages and of evaluation; fields are documented as in `configs.sections`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Name, Section, knob


class SftConfig(Section):
    """Stage 1: supervised reasoning with distillation from a segmentation-only teacher."""

    teacher_checkpoint: str | None = knob(
        None, "run or checkpoint folder of the teacher", "path", "paper 3.1", min_length=1
    )
    teacher_answer: Literal["conclusion", "class", "plain"] = knob(
        "class",
        'answer the teacher reads: "It is {class} [SEG]." (published), "It is [SEG]." (paper text), or the last two '
        "sentences of the reasoning",
        "name",
        "published code LISA_ref_distill.py",
    )
    student_start: Literal["teacher", "init_from"] = knob(
        "teacher",
        "weights that the student starts from: the teacher's, or those that init_from names (null = the base, whose "
        "[SEG] head is random)",
        "name",
        "published code train_ds.py:245-273 (commented) loads the teacher into both; the paper is silent",
    )
    freeze_mask_decoder: bool = knob(True, "use the teacher's SAM decoder and keep it frozen", "flag", "paper 3.1")


class ReflectiveConfig(Section):
    """Stage 2: training on wrong path + trigger + corrected path."""

    paths: tuple[Name, ...] = knob((), "JSONL files of reflective records", "paths", "paper 3.2")
    loss_on: Literal["all", "correction"] = knob(
        "all", "tokens that count: the whole path, or what follows the trigger", "name", "paper eq. 3"
    )
    target: Literal["reflective", "corrected_only"] = knob(
        "reflective", "whole reflective path (CRT) or the corrected path alone (CT)", "name", "paper table 4"
    )
    reflective_count: int | None = knob(1505, "reflective records mixed in; null = all", "records", "paper 4.1", ge=1)
    standard_count: int | None = knob(
        3500, "standard records (data.cot) mixed in; null = all", "records", "paper 4.1", ge=0
    )


class GrpoConfig(Section):
    """Stage 3: group-relative policy optimisation."""

    group_size: int = knob(3, "answers sampled per clip", "answers", "paper 4.1", ge=2)
    temperature: float = knob(1.0, "of sampling and scoring", "1", "published code LISA_grpo.py:432", gt=0)
    top_p: float = knob(
        0.9, "probability mass that is sampled from", "1", "published code LISA_grpo.py:433", gt=0, le=1
    )
    top_k: int | None = knob(
        None,
        "most likely words that are sampled from; 0 = all, null = as generation_config.json of model.base (else 50)",
        "words",
        "released code LISA_grpo.py:430-434 leaves it to transformers",
        ge=0,
    )
    repetition_penalty: float | None = knob(
        None,
        "divides logits of words the answer holds; 1 = none, null = as generation_config.json of model.base (else 1)",
        "1",
        "released code LISA_grpo.py:430-434 leaves it to transformers",
        gt=0,
    )
    max_new_tokens: int = knob(
        320,
        "longest answer (published: 150, which cuts reflective ones: the two paths of paper 6.2's example, trigger and "
        "ending are 148 words, about 200 tokens at 1.35 a word; the rest is room)",
        "tokens",
        "ours: LISA_grpo.py:434 has 150",
        ge=1,
    )
    clip_eps: float = knob(
        0.2, "the ratio is clipped below 1 - this", "1", "ours: GRPO's usual value, paper eq. 5 is silent", gt=0, lt=1
    )
    clip_eps_high: float = knob(
        0.2, "the ratio is clipped above 1 + this (DAPO: 0.28)", "1", "ours: symmetric as eq. 5", gt=0
    )
    beta: float = knob(0.0, "weight of the KL to the policy at the stage's start", "1", "paper 3.3", ge=0)
    updates_per_batch: int = knob(
        1, "optimiser steps on one set of samples", "steps", "published code LISA_grpo.py:572", ge=1
    )
    advantage: Literal["std", "mean", "leave_one_out"] = knob(
        "std",
        "reward minus group mean over group std (eq. 4), without the std, or minus the others' mean",
        "name",
        "paper eq. 4",
    )
    advantage_eps: float = knob(1e-4, "added to the std", "1", "published code LISA_grpo.py:569", gt=0)
    normalisation: Literal["sequence", "token"] = knob(
        "sequence", "mean over each answer, then over answers (eq. 5), or over all tokens (DAPO)", "name", "paper eq. 5"
    )
    mask_truncated: bool = knob(
        False, "leave answers cut at max_new_tokens out of the policy loss", "flag", "ours: off as published"
    )
    mask_loss_on: Literal["all", "class_correct", "best", "none"] = knob(
        "all", "answers whose masks are trained (BCE + Dice)", "name", "paper eq. 8"
    )
    reward_weights: dict[Name, Annotated[float, Field(ge=0)]] = knob(
        {"format": 1.0, "iou": 1.0, "class": 1.0}, "coefficient of each reward by name", "1", "paper 3.3"
    )
    reward_module: str | None = knob(
        None, "Python module that registers more rewards", "module", "ours: extension point"
    )
    class_scoring: Literal["exact", "released"] = knob(
        "exact", "class reward 0/1 by the whole name, or the released code's 0/1/2 by one word", "name", "paper 3.3"
    )


class EvalConfig(Section):
    """train_ds_test.py."""

    checkpoint: str | None = knob(None, "run or checkpoint folder to evaluate", "path", "ours", min_length=1)
    splits: tuple[Literal["train", "val", "test", "test_s", "test_u", "test_n"], ...] = knob(
        ("test_s", "test_u", "test_n"), "splits that are scored (AVSBench: test)", "names", "paper 4.1", min_length=1
    )
    protocol: tuple[Literal["official", "per_expression", "s4", "ms3"], ...] = knob(
        ("official", "per_expression"),
        "Ref-AVS's own scoring (256 px, 4 clips pooled, J at 0.4), AURORA's (native size, per clip, 0.5), and "
        "AVSBench's of its subsets s4 and ms3 (224 px, 4 clips pooled, 0.5)",
        "names",
        "Ref-AVS official code",
        min_length=1,
    )
    batch_size: int = knob(
        1, "clips generated at once per process", "clips", "published code train_ds_test.py:85", ge=1
    )
    max_new_tokens: int = knob(
        512,
        "longest answer (released evaluation: 2048, LISA.py:199)",
        "tokens",
        "our choice: reflective paths fit",
        ge=1,
    )
    repetition_penalty: float | None = knob(
        None,
        "of greedy answers: 1 = none, null = as generation_config.json of model.base (else 1), the only field of that "
        "file that reaches a greedy answer",
        "1",
        "released code LISA.py:195-200 leaves it to transformers",
        gt=0,
    )
    probe: Literal["none", "shuffle_audio", "zero_audio", "shuffle_video"] = knob(
        "none", "exchange or silence one modality: does the model use it?", "name", "ours"
    )
    limit: int | None = knob(None, "rows scored per split, evenly spread; null = all", "rows", "ours", ge=1)
    pictures: int = knob(12, "clips drawn into the report", "clips", "ours", ge=0)
    save_masks: bool = knob(False, "write every predicted mask as PNG", "flag", "ours")
    save_probabilities: bool = knob(
        False, "write every predicted mask's probabilities as 16-bit PNG (scripts/evaluate_masks.py)", "flag", "ours"
    )
    output_dir: str = knob("runs/eval", "folder of tables, pictures and predictions", "path", "ours", min_length=1)
