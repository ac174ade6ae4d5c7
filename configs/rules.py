"""Combinations of fields that cannot be, with what to do instead: the rules of `configs.schema.RunConfig`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
"""Parameters whose [SEG] rows `trainable.seg_rows_only` trains."""

REASONED = ("reasoning", "conclusion")
"""Answers that are made of reasoning records."""
PROTOCOL = {"refavs": "official", "avsbench_s4": "s4", "avsbench_ms3": "ms3"}
Rule = tuple[Callable[[Any], object], str, str, str]
"""(condition on a RunConfig, fields, what is wrong, remedy)"""


def _where(applies: Callable[[Any], bool], *rules: Rule) -> tuple[Rule, ...]:
    """`rules` that count only where `applies` holds."""
    return tuple((lambda c, broken=broken: applies(c) and broken(c), *texts) for broken, *texts in rules)


RULES: tuple[Rule, ...] = (
    # What a stage starts from.
    (lambda c: c.stage in ("reflective", "grpo") and not c.init_from, "init_from + stage",
     "this stage starts from the weights of an earlier one", "set init_from to that run"),
    (lambda c: c.stage in ("teacher", "sft", "reflective") and c.data.answer in REASONED and not c.data.cot,
     "data.cot + data.answer", "answers with reasoning need reasoning records",
     "list the JSONL files in data.cot, or set data.answer to plain"),
    (lambda c: c.stage == "teacher" and c.data.answer == "reasoning", "data.answer + stage",
     "the teacher learns segmentation alone (paper 3.1)", "set data.answer to conclusion, class or plain"),
    (lambda c: c.stage == "reflective" and not c.reflective.paths, "reflective.paths + stage",
     "stage reflective needs its records", "list JSONL files in reflective.paths"),
    (lambda c: c.stage == "eval" and not c.eval.checkpoint, "eval.checkpoint + stage", "nothing to evaluate",
     "set eval.checkpoint to a run folder"),
    # The teacher of stage 1.
    (lambda c: c.loss.distill > 0 and c.stage not in ("sft", "eval"), "loss.distill + stage",
     "only stage sft has a teacher to distil from", "set loss.distill to 0"),
    *_where(lambda c: c.stage == "sft",
        (lambda c: c.loss.distill > 0 and c.sft.teacher_answer in REASONED and not c.data.cot,
         "data.cot + sft.teacher_answer", "the teacher's conclusions are read from reasoning records",
         "list the JSONL files in data.cot, or set sft.teacher_answer to class or plain"),
        (lambda c: c.loss.distill > 0 and not c.sft.teacher_checkpoint, "sft.teacher_checkpoint + loss.distill",
         "distillation needs a trained teacher", "set sft.teacher_checkpoint to its run folder, or loss.distill to 0"),
        (lambda c: c.sft.student_start == "teacher" and not c.sft.teacher_checkpoint,
         "sft.teacher_checkpoint + sft.student_start", "there is no teacher to start from",
         "set sft.teacher_checkpoint, or sft.student_start to init_from"),
        (lambda c: c.sft.student_start == "teacher" and c.init_from, "init_from + sft.student_start",
         "the student cannot start from the teacher and from another run",
         "set sft.student_start to init_from, or init_from to null"),
        (lambda c: c.sft.freeze_mask_decoder and not c.sft.teacher_checkpoint,
         "sft.teacher_checkpoint + sft.freeze_mask_decoder", "the frozen mask decoder is the teacher's",
         "set sft.teacher_checkpoint, or sft.freeze_mask_decoder to false"),
        (lambda c: c.sft.freeze_mask_decoder and c.trainable.mask_decoder,
         "sft.freeze_mask_decoder + trainable.mask_decoder", "the mask decoder cannot be both frozen and trained",
         "set one of the two to false"),
        (lambda c: c.sft.teacher_checkpoint
         and not (c.loss.distill or c.sft.freeze_mask_decoder or c.sft.student_start == "teacher"),
         "sft.teacher_checkpoint + loss.distill + sft.freeze_mask_decoder + sft.student_start",
         "the teacher would be loaded and used for nothing",
         "set loss.distill above 0, freeze_mask_decoder true, student_start to teacher, or teacher_checkpoint to null"),
    ),
    # What is trained, and by which loss.
    (lambda c: c.trainable.lora_rank > 0 and not c.trainable.lora_targets,
     "trainable.lora_rank + trainable.lora_targets", "adapters without a place",
     "list lora_targets, or set lora_rank to 0"),
    (lambda c: c.trainable.seg_rows_only and any(re.search(p, name) for p in c.trainable.full for name in VOCABULARY),
     "trainable.seg_rows_only + trainable.full", "a pattern already trains whole rows of the vocabulary",
     "remove the patterns of embed_tokens and lm_head from trainable.full, or set seg_rows_only to false"),
    (lambda c: not (c.trainable.lora_rank or c.trainable.full or c.trainable.seg_head or c.trainable.mask_decoder
                    or c.trainable.seg_rows_only), "trainable", "nothing is trained",
     "set lora_rank, full, seg_head, mask_decoder or seg_rows_only"),
    (lambda c: c.stage == "grpo" and c.loss.ce > 0, "loss.ce + stage", "stage grpo has no cross entropy (paper eq. 8)",
     "set loss.ce to 0"),
    (lambda c: c.stage not in ("grpo", "eval") and not (c.loss.ce or c.loss.bce or c.loss.dice or c.loss.distill),
     "loss", "all weights are 0, so nothing would be learned", "set one of loss.* above 0"),
    *_where(lambda c: c.stage != "eval",
        (lambda c: "text_hidden_fcs" in c.optim.group_lr_scale and not c.trainable.seg_head,
         "optim.group_lr_scale + trainable.seg_head", "text_hidden_fcs is not trained",
         "leave it out of group_lr_scale, or set trainable.seg_head to true"),
        (lambda c: "mask_decoder" in c.optim.group_lr_scale and not c.trainable.mask_decoder,
         "optim.group_lr_scale + trainable.mask_decoder", "the mask decoder is not trained",
         "leave it out of group_lr_scale, or set trainable.mask_decoder to true"),
        (lambda c: c.trainable.mask_decoder and c.loss.bce + c.loss.dice == 0,
         "trainable.mask_decoder + loss.bce + loss.dice", "without a mask loss the mask decoder gets no gradient",
         "set loss.bce or loss.dice above 0, or trainable.mask_decoder to false"),
    ),
    # Schedule, engine and log.
    (lambda c: c.optim.warmup_steps >= c.optim.steps, "optim.warmup_steps + optim.steps", "the warm-up would never end",
     "set warmup_steps below optim.steps"),
    # With steps above the warm-up this keeps the horizon behind the warm-up too.
    (lambda c: c.optim.schedule != "constant" and (c.optim.decay_steps or c.optim.steps) < c.optim.steps,
     "optim.decay_steps + optim.steps", "from decay_steps on the learning rate is 0 and nothing is learned",
     "set decay_steps to optim.steps or more, or to null"),
    (lambda c: c.engine.offload and c.engine.zero_stage == 0, "engine.offload + engine.zero_stage",
     "offloading needs ZeRO", "set zero_stage to 1, 2 or 3"),
    (lambda c: c.engine.accumulate_in == "fp32" and c.engine.precision == "bf16" and c.engine.zero_stage < 2,
     "engine.accumulate_in + engine.zero_stage", "DeepSpeed sums bf16 gradients in float32 at ZeRO 2 and 3 alone",
     "set zero_stage to 2 or 3, or accumulate_in to weights"),
    (lambda c: c.data.num_frames and (c.model.decode_frames_per_step or 0) > c.data.num_frames,
     "model.decode_frames_per_step + data.num_frames", "more frames are decoded than read",
     "set decode_frames_per_step to num_frames or less"),
    # Stage grpo logs answers that it draws anyway.
    (lambda c: c.log.samples_every and c.engine.zero_stage == 3 and c.stage != "grpo",
     "log.samples_every + engine.zero_stage", "one process cannot write an answer with partitioned weights",
     "set log.samples_every to 0, or zero_stage to 2"),
    (lambda c: c.loss.distill > 0 and c.engine.zero_stage == 3, "loss.distill + engine.zero_stage",
     "the teacher's pass needs whole weights", "set zero_stage to 2 or less"),
    (lambda c: c.log.save_every % c.log.every, "log.save_every + log.every",
     "a checkpoint between two rows of metrics would lose the means so far", "make save_every a multiple of every"),
    *_where(lambda c: c.stage == "grpo",
        (lambda c: c.grpo.clip_eps_high < c.grpo.clip_eps, "grpo.clip_eps_high + grpo.clip_eps",
         "the upper clip is narrower than the lower", "set clip_eps_high to clip_eps or more"),
        (lambda c: c.log.save_every % c.grpo.updates_per_batch, "log.save_every + grpo.updates_per_batch",
         "a checkpoint between two updates on the same samples would lose the samples",
         "make save_every a multiple of updates_per_batch"),
        (lambda c: not any(c.grpo.reward_weights.values()), "grpo.reward_weights", "no reward has a weight",
         "give one reward a weight above 0"),
        (lambda c: c.grpo.mask_loss_on != "none" and c.loss.bce + c.loss.dice == 0,
         "grpo.mask_loss_on + loss.bce + loss.dice", "the mask losses have no weight",
         "set mask_loss_on to none, or a weight"),
        (lambda c: c.grpo.mask_loss_on == "none" and c.trainable.mask_decoder,
         "grpo.mask_loss_on + trainable.mask_decoder", "without a mask loss the mask decoder gets no gradient",
         "set trainable.mask_decoder to false"),
    ),
    # The benchmark.
    (lambda c: c.stage == "eval" and any(
        (split == "test") == (c.data.benchmark == "refavs") for split in c.eval.splits if split.startswith("test")),
     "eval.splits + data.benchmark", "the benchmark has no such split",
     "choose from train, val, test_s, test_u, test_n (Ref-AVS) or train, val, test (AVSBench)"),
    (lambda c: c.stage == "eval" and set(c.eval.protocol) - {"per_expression", PROTOCOL[c.data.benchmark]},
     "eval.protocol + data.benchmark", "another benchmark's protocol",
     "choose from per_expression and the benchmark's own: official (Ref-AVS), s4 or ms3"),
    *_where(lambda c: c.data.benchmark != "refavs" and c.stage != "eval",
        (lambda c: c.data.cot or c.data.answer in REASONED, "data.benchmark + data.cot + data.answer",
         "AVSBench has no reasoning records", "set data.cot to [] and data.answer to plain or class"),
        (lambda c: c.stage == "reflective", "data.benchmark + stage", "AVSBench has no reflective paths",
         "set stage to grpo or sft"),
        (lambda c: c.data.benchmark == "avsbench_ms3" and (c.data.answer == "class" or c.stage == "grpo" and (
            c.grpo.reward_weights.get("class", 0) > 0 or c.grpo.mask_loss_on == "class_correct")),
         "data.benchmark + data.answer + grpo.reward_weights + grpo.mask_loss_on", "MS3 does not name what sounds",
         "set data.answer to plain; in stage grpo the class reward to 0 and mask_loss_on to all or best"),
    ),
    (lambda c: c.model.segmenter != "sam2" and (
        c.model.sam_memory != "none" or c.model.sam_prompt != "alone" or c.model.sam_gate),
     "model.segmenter + model.sam_memory + model.sam_prompt + model.sam_gate", "SAM reads none of these",
     "set segmenter to sam2, or sam_memory to none, sam_prompt to alone and sam_gate to false"),
    # Masks that are not asked for by a written [SEG].
    (lambda c: c.model.text_encoder is not None and c.model.prompter != "text_encoder",
     "model.text_encoder + model.prompter", "the text encoder would be loaded and used for nothing",
     "set model.prompter to text_encoder, or model.text_encoder to null"),
    (lambda c: c.model.learnable_tokens != 1 and c.model.prompter != "learnable_tokens",
     "model.learnable_tokens + model.prompter", "no learnable tokens are appended",
     "set model.prompter to learnable_tokens, or remove model.learnable_tokens"),
    *_where(lambda c: c.model.prompter != "seg_token",
        (lambda c: c.stage not in ("sft", "eval"), "model.prompter + stage", "this stage needs a written [SEG]",
         "set stage to sft, or model.prompter to seg_token"),
        (lambda c: c.loss.distill > 0, "model.prompter + loss.distill", "the teacher's features are those of a [SEG]",
         "set loss.distill to 0, or model.prompter to seg_token"),
        (lambda c: c.trainable.seg_rows_only, "model.prompter + trainable.seg_rows_only", "no [SEG] is written or read",
         "set seg_rows_only to false"),
        (lambda c: c.stage == "sft" and c.trainable.seg_head and c.loss.bce + c.loss.dice == 0,
         "trainable.seg_head + loss.bce + loss.dice",
         "without a mask loss the projection and the learnable tokens get no gradient",
         "set trainable.seg_head to false, or loss.bce or loss.dice above 0"),
    ),
    *_where(lambda c: c.model.prompter == "text_encoder" and c.stage == "sft",
        (lambda c: c.loss.ce > 0, "model.prompter + loss.ce", "a text encoder writes no answer", "set loss.ce to 0"),
        (lambda c: c.data.answer != "plain", "model.prompter + data.answer", "a text encoder reads no answer",
         "set data.answer to plain"),
    ),
)  # fmt: skip
"""Combinations that cannot be: (condition, fields, what is wrong, remedy). All are checked, none stops the others."""
