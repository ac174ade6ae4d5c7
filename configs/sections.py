"""The sections that every stage reads. Each field carries description, unit, default and source.

A source is a paper section ("paper 4.1"), a line of the published code at commit d601816 ("published code
train_ds.py:92") or "ours" where both are silent or we depart from them (the reason stands in the description).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Name, Positive, Regex, Section, knob


class ModelConfig(Section):
    """Which weights make up the joint model and how they are run."""

    base: str = knob(
        "weights/VideoLLaMA2.1-7B-AV",
        "folder of the multimodal language model: config.json, safetensors, tokenizer",
        "path",
        "published code train_ds.py:40",
        min_length=1,
    )
    sam_checkpoint: str = knob(
        "weights/sam_vit_h_4b8939.pth", "SAM weights (.pth or .safetensors)", "path", "published code train_ds.py:102"
    )
    sam_type: str = knob(
        "vit_h",
        "size of SAM: vit_h, vit_l, vit_b, or a JSON file with sizes",
        "name or path",
        "published code LISA_grpo.py",
        pattern=r"^(vit_[hlb]|.+\.json)$",
    )
    sam_image_size: int = knob(
        224,
        "side of SAM's square input (1024 is the size SAM was trained at, 21 times the pixels)",
        "pixels",
        "published code train_ds.py:54",
        ge=16,
    )
    attention: Literal["eager", "sdpa"] = knob(
        "sdpa",
        "attention of the towers; the language model uses torch's fused kernels (model.aurora.shared_prompt)",
        "name",
        "ours: exact and available everywhere",
    )
    seg_token: str = knob("[SEG]", "token whose hidden state prompts SAM", "text", "paper 3.1", pattern=r"^\S+$")
    prompter: Literal["seg_token", "learnable_tokens", "text_encoder"] = knob(
        "seg_token",
        "what prompts SAM: the [SEG] that the model writes, learnable tokens appended behind its answer, or a text "
        "encoder's embedding of the reference (no answer is written)",
        "name",
        "paper 3.1, tables 2 and 7",
    )
    learnable_tokens: int = knob(
        1, "tokens appended behind the answer; their projected states are averaged", "tokens",
        "ours: one, as there is one [SEG]; paper 8.1 is silent", ge=1,
    )
    text_encoder: str | None = knob(
        None, "folder of a CLIP text model with its tokenizer; null = the base's language model reads the reference",
        "path", "ours: stands for ImageBind's text encoder (paper table 2), itself a CLIP text tower", min_length=1,
    )
    system_prompt: Literal["llama2", "qwen2", "none"] = knob(
        "llama2", "system turn: LLaMA-2's safety text as released, Qwen2's own, or none", "name",
        "released code utils/sem_seg_dataset.py:513-519"
    )
    decode_frames_per_step: int | None = knob(
        None, "frames of a clip that get a mask loss in a step (drawn by seed); null = all", "frames",
        "released code LISA_sft_distill.py:186; the paper does not say it", ge=1
    )


class TrainableConfig(Section):
    """Which weights are trained. Patterns are searched (`re.search`) in the joint model's module or parameter names."""

    lora_rank: int = knob(8, "rank of the LoRA adapters; 0 = no LoRA", "1", "published code train_ds.py:56", ge=0)
    lora_alpha: float = knob(
        16.0, "scale of the LoRA update, divided by the rank", "1", "published code train_ds.py:92", gt=0
    )
    lora_dropout: float = knob(0.05, "dropout before the adapters", "1", "published code train_ds.py:93", ge=0, lt=1)
    lora_targets: tuple[Regex, ...] = knob(
        (r"language_model\..*\.(q_proj|v_proj)$",),
        "regexes of the linear modules that get an adapter; a regex without a match is an error. The published filter "
        "also reaches the audio tower and SAM's decoder (train_ds.py:215,217), against its own freezing at :192",
        "regex",
        "published code train_ds.py:94",
    )
    full: tuple[Regex, ...] = knob(
        (r"language_model\.model\.embed_tokens\.", r"language_model\.lm_head\."),
        "regexes of the parameters that are trained whole; a regex without a match is an error",
        "regex",
        "published code train_ds.py:280",
    )
    seg_head: bool = knob(
        True, "train text_hidden_fcs, the projection of [SEG]", "flag", "published code train_ds.py:280"
    )
    mask_decoder: bool = knob(True, "train SAM's mask decoder", "flag", "published code train_ds.py:280")
    seg_rows_only: bool = knob(
        False,
        "train only the [SEG] rows of embedding and lm_head (7k values, not 1.09 G)",
        "flag",
        "ours: lean alternative",
    )


class DataConfig(Section):
    """What is read and how a row becomes a sample."""

    benchmark: Literal["refavs", "avsbench_s4", "avsbench_ms3"] = knob(
        "refavs",
        'which benchmark lies in `root`; AVSBench asks for "The sounding object" in every clip',
        "name",
        "paper 4.1, 4.4",
    )
    root: str = knob(
        "data/refavs", "folder of the benchmark (Ref-AVS: metadata.csv, media/, gt_mask/; AVSBench: see "
        "dataset/avsbench.py)", "path", "published code", min_length=1
    )
    cot: tuple[Name, ...] = knob(
        (),
        "JSONL files of reasoning records, keyed by metadata row; where any are listed, only rows with a record are "
        "trained on, whatever the answer holds",
        "paths",
        "paper 3.1",
    )
    train_split: Literal["train", "val"] = knob("train", "split that is trained on", "name", "paper 4.1")
    null_rows: bool = knob(
        True, "keep the rows whose reference matches nothing (empty masks)", "flag",
        "released code utils/sem_seg_dataset.py:386-407"
    )
    num_workers: int = knob(
        4, "decoding processes per rank; 0 = decode in the training process", "processes", "ours", ge=0
    )
    audio_padding_seconds: float | None = knob(
        30.0,
        "length to which the sound is padded with silence (30 s: 1,496 audio tokens); null = none (10 s: 496 tokens)",
        "seconds",
        "published code dataset.py:127",
        gt=0,
    )
    frame_resize: Literal["warp", "pad"] = knob(
        "warp",
        "frames to the vision tower's square: stretched, or padded first",
        "name",
        "published code train_ds.py:177",
    )
    num_frames: int | None = knob(
        None,
        "frames read per clip, evenly spaced; null = all on disk (10)",
        "frames",
        "published code train_ds.py:175",
        ge=1,
    )
    answer: Literal["reasoning", "conclusion", "class", "plain"] = knob(
        "reasoning",
        'target text: "{reasoning} It is [SEG].", its last two sentences alone, "It is {class} [SEG]." or '
        '"It is [SEG]."',
        "name",
        "paper 3.1",
    )
    incomplete_reasoning: Literal["error", "drop"] = knob(
        "error",
        "rows without a reasoning record, or with one of 2,000 characters or more: refuse the run, or leave them out",
        "name",
        "released code utils/sem_seg_dataset.py:398 drops",
    )
    feature_cache: Literal["none", "memory", "disk"] = knob(
        "none",
        "keep the features of frozen towers by clip, in memory or in files below <data.root>/.features (about 7 MB a "
        "clip at full size)",
        "name",
        "ours: pays where clips come again",
    )
    max_image_pixels: int = knob(
        50_000_000, "larger frames or masks are refused before decoding", "pixels", "ours: guards memory", ge=1
    )
    max_audio_seconds: float = knob(120.0, "longer sound files are refused", "seconds", "ours: guards memory", gt=0)


class OptimConfig(Section):
    """AdamW and its schedule. All step counts are optimiser steps."""

    lr: float = knob(
        1e-4,
        "peak learning rate; the paper names none (GRPO: 1e-5, train_ds.py:88)",
        "1",
        "released code train_ds_test.py:87, the only trainer with a cross entropy",
        gt=0,
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = knob(
        (0.9, 0.95), "AdamW's averaging factors", "1", "published code train_ds.py:96"
    )
    weight_decay: float = knob(0.0, "decoupled weight decay", "1", "published code train_ds.py:332", ge=0)
    warmup_steps: int = knob(
        100, "linear warm-up from 0 (GRPO: 30, train_ds.py:342)", "steps", "released code train_ds_test.py:315", ge=0
    )
    steps: int = knob(720, "length of the run", "steps", "paper 4.1", ge=1)
    decay_steps: int | None = knob(
        None,
        "step at which the decay reaches 0; null = optim.steps, the end of the run. The released trainers decay over "
        "more steps than the paper trains (GRPO 4,000, train_ds.py:339; cross entropy 3,600, train_ds_test.py:312)",
        "steps",
        "our choice: without another horizon a run of any length ends at a rate of 0",
        ge=1,
    )
    schedule: Literal["linear", "cosine", "constant"] = knob(
        "linear", "decay to 0 at decay_steps after the warm-up", "name", "published code train_ds.py:337"
    )
    clip_norm: float = knob(
        1.0, "largest norm of the gradient; 0 = no clipping", "1", "published code train_ds.py:352", ge=0
    )
    group_lr_scale: dict[Regex, Positive] = knob(
        {}, "regex on parameter names -> factor on lr; the first match counts", "1", "ours: the mini world's [SEG] head"
    )


class EngineConfig(Section):
    """How DeepSpeed runs the step."""

    micro_batch: int = knob(1, "clips per process and forward", "clips", "paper 4.1", ge=1)
    accumulation: int = knob(4, "forwards per optimiser step", "micro-batches", "paper 4.1", ge=1)
    zero_stage: Literal[0, 1, 2, 3] = knob(2, "ZeRO stage", "1", "published code train_ds.py:354")
    precision: Literal["fp32", "bf16"] = knob("bf16", "weights and matmuls", "name", "published code train_ds.py:48")
    accumulate_in: Literal["weights", "fp32"] = knob(
        "weights",
        "type in which the gradients of micro-batches are summed: the weights' own, or float32 (ZeRO 2 and 3); under "
        "bf16 the first is off by 0.2 % after 4, see docs/memory.md",
        "name",
        "released code leaves DeepSpeed's default alone",
    )
    gradient_checkpointing: bool = knob(
        True, "recompute the language model's activations in backward", "flag", "published code train_ds.py:165"
    )
    offload: bool = knob(
        False,
        "keep the optimiser's states in CPU memory (published: true); 2 x 48 GB hold them",
        "flag",
        "ours: faster where it fits",
    )
    threads: int | None = knob(
        None, "CPU threads per process; null = cores / processes on this machine", "threads", "ours", ge=1
    )


class LossConfig(Section):
    """Weights of the summed losses. The published code uses bce 2, dice 0.5 (train_ds.py:89-91); the paper 1 each."""

    ce: float = knob(1.0, "weight of the cross entropy of the answer", "1", "paper eq. 6", ge=0)
    bce: float = knob(1.0, "weight of the masks' binary cross entropy (published: 2)", "1", "paper eq. 6", ge=0)
    dice: float = knob(1.0, "weight of the masks' Dice loss (published: 0.5)", "1", "paper eq. 6", ge=0)
    mask_side: int | None = knob(
        None,
        "long side at which BCE and Dice are computed; null = the frames' own, as published (smaller: less memory)",
        "pixels",
        "published code LISA_sft_distill.py:370",
        ge=16,
    )
    distill: float = knob(
        0.0,
        "weight of MSE(f_t, f_s) between [SEG] features; only stage sft distils (there 1)",
        "1",
        "paper eq. 2, 6",
        ge=0,
    )


class LogConfig(Section):
    """What a run writes and how often."""

    every: int = knob(1, "between two rows of metrics (means over the steps between)", "steps", "ours", ge=1)
    save_every: int = knob(100, "between two checkpoints", "steps", "ours", ge=1)
    keep: int = knob(2, "checkpoints kept; older ones are deleted", "checkpoints", "ours", ge=1)
    keep_best: str | None = knob(
        None,
        "scalar of metrics.jsonl (loss, reward_all ...; its mean since the checkpoint before) by which the best "
        "checkpoint is kept besides; null = none",
        "name",
        "ours",
        min_length=1,
    )
    best_is: Literal["lowest", "highest"] = knob("lowest", "which value of keep_best is the best", "name", "ours")
    grace_seconds: float = knob(
        120.0,
        "after SIGTERM (a scheduler takes the machine): time to finish the step and save; then the run ends without",
        "seconds",
        "ours: SLURM's --signal=TERM@120",
        gt=0,
    )
    tensorboard: bool = knob(True, "write TensorBoard scalars", "flag", "published code train_ds.py:580")
    samples_every: int = knob(
        0,
        "between two greedy answers for the clips at hand, written to samples.jsonl; 0 = never",
        "steps",
        "ours",
        ge=0,
    )
