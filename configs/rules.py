"""Rules between fields of a `RunConfig`, each with its remedy; all are checked, none stops the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

from configs.prompter_rules import prompter_rules
from configs.rule import BrokenRule

if TYPE_CHECKING:
    from configs.schema import RunConfig

VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""Parameters whose [SEG] rows `trainable.seg_rows_only` trains."""


_MADE_OF_REASONING = ("reasoning", "conclusion")


def broken_rules(config: RunConfig) -> list[BrokenRule]:
    """Every rule that `config` breaks, in reading order of the fields."""
    checks = (
        *(_stage_rules, _teacher_rules, _trainable_rules, _rate_rules, _loss_rules, _run_rules),
        *(_grpo_rules, _benchmark_rules, prompter_rules),
    )
    found = [broken for check in checks for broken in check(config)]
    return [replace(b, values=tuple(reduce(getattr, name.split("."), config) for name in b.fields)) for b in found]


def _stage_rules(c: RunConfig) -> Iterator[BrokenRule]:
    if c.stage in ("reflective", "grpo") and not c.init_from:
        yield BrokenRule(
            ("init_from", "stage"),
            f"stage {c.stage} starts from the weights of an earlier stage",
            "set init_from to that run",
        )
    if c.stage in ("teacher", "sft", "reflective") and c.data.answer in _MADE_OF_REASONING and not c.data.cot:
        yield BrokenRule(
            ("data.cot", "data.answer"),
            "answers with reasoning need reasoning records",
            "list the JSONL files in data.cot, or set data.answer to plain",
        )
    if c.stage == "teacher" and c.data.answer == "reasoning":
        yield BrokenRule(
            ("data.answer", "stage"),
            "the teacher learns segmentation alone (paper 3.1)",
            "set data.answer to conclusion, class or plain",
        )
    if c.stage == "reflective" and not c.reflective.paths:
        yield BrokenRule(
            ("reflective.paths", "stage"), "stage reflective needs its records", "list JSONL files in reflective.paths"
        )
    if c.stage == "eval" and not c.eval.checkpoint:
        yield BrokenRule(("eval.checkpoint", "stage"), "nothing to evaluate", "set eval.checkpoint to a run folder")


def _benchmark_rules(c: RunConfig) -> Iterator[BrokenRule]:
    subset = c.data.benchmark.removeprefix("avsbench_")
    avsbench = c.data.benchmark != "refavs"
    own = {"per_expression", subset} if avsbench else {"per_expression", "official"}
    splits = {"train", "val", "test"} if avsbench else {"train", "val", "test_s", "test_u", "test_n"}
    if c.stage == "eval" and not splits.issuperset(c.eval.splits):
        yield BrokenRule(
            ("eval.splits", "data.benchmark"), "the benchmark has no such split", f"choose from {sorted(splits)}"
        )
    if c.stage == "eval" and not own.issuperset(c.eval.protocol):
        yield BrokenRule(
            ("eval.protocol", "data.benchmark"), "another benchmark's protocol", f"choose from {sorted(own)}"
        )
    if avsbench and c.stage != "eval" and (c.data.cot or c.data.answer in ("reasoning", "conclusion")):
        yield BrokenRule(
            ("data.benchmark", "data.cot", "data.answer"),
            "AVSBench has no reasoning records",
            "set data.cot to [] and data.answer to plain or class",
        )
    if avsbench and c.stage == "reflective":
        yield BrokenRule(("data.benchmark", "stage"), "AVSBench has no reflective paths", "set stage to grpo or sft")
    if subset == "ms3" and c.stage != "eval" and _needs_class(c):
        yield BrokenRule(
            ("data.benchmark", "data.answer", "grpo.reward_weights", "grpo.mask_loss_on"),
            "MS3 does not name what sounds",
            "set data.answer to plain; in stage grpo the class reward to 0 and mask_loss_on to all or best",
        )


def _needs_class(c: RunConfig) -> bool:
    rewarded = c.grpo.reward_weights.get("class", 0) > 0 or c.grpo.mask_loss_on == "class_correct"
    return c.data.answer == "class" or (c.stage == "grpo" and rewarded)


def _teacher_rules(c: RunConfig) -> Iterator[BrokenRule]:
    if c.loss.distill > 0 and c.stage not in ("sft", "eval"):
        yield BrokenRule(
            ("loss.distill", "stage"), f"stage {c.stage} has no teacher to distil from", "set loss.distill to 0"
        )
    if c.stage != "sft":
        return
    teacher = c.sft.teacher_checkpoint
    if c.loss.distill > 0 and c.sft.teacher_answer in _MADE_OF_REASONING and not c.data.cot:
        yield BrokenRule(
            ("data.cot", "sft.teacher_answer"),
            "the teacher's conclusions are read from reasoning records",
            "list the JSONL files in data.cot, or set sft.teacher_answer to class or plain",
        )
    if c.loss.distill > 0 and not teacher:
        yield BrokenRule(
            ("sft.teacher_checkpoint", "loss.distill"),
            "distillation needs a trained teacher",
            "set sft.teacher_checkpoint to a teacher's run folder, or loss.distill to 0",
        )
    start = c.sft.student_start == "teacher"
    if start and not teacher:
        yield BrokenRule(
            ("sft.teacher_checkpoint", "sft.student_start"),
            "there is no teacher to start from",
            "set sft.teacher_checkpoint, or sft.student_start to init_from",
        )
    if start and c.init_from:
        yield BrokenRule(
            ("init_from", "sft.student_start"),
            "the student cannot start from the teacher and from another run",
            "set sft.student_start to init_from, or init_from to null",
        )
    if c.sft.freeze_mask_decoder and not teacher:
        yield BrokenRule(
            ("sft.teacher_checkpoint", "sft.freeze_mask_decoder"),
            "the frozen mask decoder is the teacher's",
            "set sft.teacher_checkpoint, or sft.freeze_mask_decoder to false",
        )
    if c.sft.freeze_mask_decoder and c.trainable.mask_decoder:
        yield BrokenRule(
            ("sft.freeze_mask_decoder", "trainable.mask_decoder"),
            "the mask decoder cannot be both frozen and trained",
            "set one of the two to false",
        )
    if teacher and c.loss.distill == 0 and not c.sft.freeze_mask_decoder and not start:
        yield BrokenRule(
            ("sft.teacher_checkpoint", "loss.distill", "sft.freeze_mask_decoder", "sft.student_start"),
            "the teacher would be loaded and used for nothing",
            "set loss.distill above 0, sft.freeze_mask_decoder to true, sft.student_start to teacher, or "
            "sft.teacher_checkpoint to null",
        )


def _trainable_rules(c: RunConfig) -> Iterator[BrokenRule]:
    t = c.trainable
    if t.lora_rank > 0 and not t.lora_targets:
        yield BrokenRule(
            ("trainable.lora_rank", "trainable.lora_targets"),
            "adapters without a place",
            "list lora_targets, or set lora_rank to 0",
        )
    if t.seg_rows_only:
        for pattern in t.full:
            if any(re.search(pattern, name) for name in VOCABULARY):
                yield BrokenRule(
                    ("trainable.seg_rows_only", "trainable.full"),
                    f"{pattern!r} already trains whole rows of the vocabulary",
                    "remove that pattern from trainable.full, or set seg_rows_only to false",
                )
    if not (t.lora_rank or t.full or t.seg_head or t.mask_decoder or t.seg_rows_only):
        yield BrokenRule(
            ("trainable",), "nothing is trained", "set lora_rank, full, seg_head, mask_decoder or seg_rows_only"
        )


_PARTS = {"text_hidden_fcs": "seg_head", "mask_decoder": "mask_decoder"}
"""Parts that an own learning rate is usual for -> the switch that trains them."""


def _rate_rules(c: RunConfig) -> Iterator[BrokenRule]:
    for name in c.optim.group_lr_scale:
        switch = _PARTS.get(name)
        if switch and not getattr(c.trainable, switch) and c.stage != "eval":
            yield BrokenRule(
                ("optim.group_lr_scale", f"trainable.{switch}"),
                f"{name!r} is not trained",
                f"leave it out of group_lr_scale, or set trainable.{switch} to true",
            )


def _loss_rules(c: RunConfig) -> Iterator[BrokenRule]:
    w = c.loss
    if c.stage == "grpo" and w.ce > 0:
        yield BrokenRule(("loss.ce", "stage"), "stage grpo has no cross entropy (paper eq. 8)", "set loss.ce to 0")
    if c.stage not in ("grpo", "eval") and w.ce + w.bce + w.dice + w.distill == 0:
        yield BrokenRule(("loss",), "all weights are 0, so nothing would be learned", "set one of loss.* above 0")
    if c.trainable.mask_decoder and w.bce + w.dice == 0 and c.stage != "eval":
        yield BrokenRule(
            ("trainable.mask_decoder", "loss.bce", "loss.dice"),
            "without a mask loss the mask decoder gets no gradient",
            "set loss.bce or loss.dice above 0, or trainable.mask_decoder to false",
        )


def _run_rules(c: RunConfig) -> Iterator[BrokenRule]:
    if c.optim.warmup_steps >= c.optim.steps:
        yield BrokenRule(
            ("optim.warmup_steps", "optim.steps"), "the warm-up would never end", "set warmup_steps below optim.steps"
        )
    # With steps above the warm-up this keeps the horizon behind the warm-up too.
    if c.optim.decay_steps is not None and c.optim.decay_steps < c.optim.steps and c.optim.schedule != "constant":
        yield BrokenRule(
            ("optim.decay_steps", "optim.steps"),
            "from decay_steps on the learning rate is 0 and nothing is learned",
            "set decay_steps to optim.steps or more, or to null",
        )
    if c.engine.offload and c.engine.zero_stage == 0:
        yield BrokenRule(
            ("engine.offload", "engine.zero_stage"), "offloading needs ZeRO", "set zero_stage to 1, 2 or 3"
        )
    if c.engine.accumulate_in == "fp32" and c.engine.precision == "bf16" and c.engine.zero_stage < 2:
        yield BrokenRule(
            ("engine.accumulate_in", "engine.zero_stage"),
            "DeepSpeed sums bf16 gradients in float32 at ZeRO 2 and 3 alone",
            "set zero_stage to 2 or 3, or accumulate_in to weights",
        )
    if c.data.num_frames and c.model.decode_frames_per_step and c.model.decode_frames_per_step > c.data.num_frames:
        yield BrokenRule(
            ("model.decode_frames_per_step", "data.num_frames"),
            "more frames are decoded than read",
            "set decode_frames_per_step to num_frames or less",
        )
    if c.log.samples_every and c.engine.zero_stage == 3 and c.stage != "grpo":  # which logs what it drew anyway
        yield BrokenRule(
            ("log.samples_every", "engine.zero_stage"),
            "one process cannot write an answer with partitioned weights",
            "set log.samples_every to 0, or zero_stage to 2",
        )
    if c.loss.distill > 0 and c.engine.zero_stage == 3:
        yield BrokenRule(
            ("loss.distill", "engine.zero_stage"),
            "the teacher's pass needs whole weights",
            "set zero_stage to 2 or less",
        )
    if c.log.save_every % c.log.every:
        yield BrokenRule(
            ("log.save_every", "log.every"),
            "a checkpoint between two rows of metrics would lose the means so far",
            "make save_every a multiple of every",
        )


def _grpo_rules(c: RunConfig) -> Iterator[BrokenRule]:
    g = c.grpo
    if c.stage != "grpo":
        return
    if g.clip_eps_high < g.clip_eps:
        yield BrokenRule(
            ("grpo.clip_eps_high", "grpo.clip_eps"),
            "the upper clip is narrower than the lower",
            "set clip_eps_high to clip_eps or more",
        )
    if c.log.save_every % g.updates_per_batch:
        yield BrokenRule(
            ("log.save_every", "grpo.updates_per_batch"),
            "a checkpoint between two updates on the same samples would lose the samples",
            "make save_every a multiple of updates_per_batch",
        )
    if not any(g.reward_weights.values()):
        yield BrokenRule(("grpo.reward_weights",), "no reward has a weight", "give one reward a weight above 0")
    if g.mask_loss_on != "none" and c.loss.bce + c.loss.dice == 0:
        yield BrokenRule(
            ("grpo.mask_loss_on", "loss.bce", "loss.dice"),
            "the mask losses have no weight",
            "set mask_loss_on to none, or a weight",
        )
    if g.mask_loss_on == "none" and c.trainable.mask_decoder:
        yield BrokenRule(
            ("grpo.mask_loss_on", "trainable.mask_decoder"),
            "without a mask loss the mask decoder gets no gradient",
            "set trainable.mask_decoder to false",
        )
