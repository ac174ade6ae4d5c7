"""Every field of a run (`RunConfig`) with its meaning, unit, range, default and source.

A source is a place in the paper ("paper 4.1"), a line of the authors' released code at commit d601816 ("released code
train_ds.py:92"), the benchmark's official code, or "our choice: <why>". `utils.config.load_config` reads a YAML file
into a `RunConfig`; rules between fields stand in `configs.rules`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from configs.rules import RULES

StageName = Literal["teacher", "sft", "reflective", "grpo", "eval"]


def field(default: Any, meaning: str, unit: str, source: str, **limits: Any) -> Any:
    """A documented field; `limits` are pydantic's (ge, le, pattern ...)."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source}, **limits)


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from error
    return pattern


Regex = Annotated[str, AfterValidator(_regular_expression)]
Name = Annotated[str, Field(min_length=1)]
Average = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, strictly typed, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


class ModelConfig(Section):
    """Which weights make up the joint model and how they are run."""

    base: Name = field("weights/VideoLLaMA2.1-7B-AV", "folder of the multimodal language model: config.json, "
        "safetensors, tokenizer", "path", "released code train_ds.py:40")
    segmenter: Literal["sam", "sam2"] = field("sam", "mask model: SAM (segment_anything) or SAM 2.1 (transformers)",
        "name", "released code train_ds.py:102: SAM")
    sam_checkpoint: str = field("weights/sam_vit_h_4b8939.pth", "SAM weights (.pth or .safetensors); of sam2 a folder "
        "in transformers' layout, such as facebook/sam2.1-hiera-large", "path", "released code train_ds.py:102")
    sam_type: str = field("vit_h", "size of SAM: vit_h, vit_l, vit_b, or a JSON file with sizes (sam2: not read, its "
        "folder says it)", "name or path", "released code train_ds.py:102", pattern=r"^(vit_[hlb]|.+\.json)$")
    sam_image_size: int = field(224, "side of SAM's square input (1024 is the size SAM was trained at, 21 times the "
        "pixels)", "pixels", "released code train_ds.py:54", ge=16)
    sam_memory: Literal["none", "first", "every"] = field("none", "sam2: frames alone; [SEG] in the first frame and "
        "memory behind it; or [SEG] in every frame and memory", "name", "our choice: as SAM, and as Sa2VA trains")
    sam_prompt: Literal["alone", "behind_no_point"] = field("alone", "sam2: the prompt is [SEG] alone, or [SEG] behind "
        "SAM 2's two tokens of an absent point (Sa2VA)", "name", "released code LISA_sft_distill.py:353-375: alone")
    sam_gate: bool = field(False, "sam2: its hard decisions where nothing is trained: no mask where its score says "
        "that the object is absent, binary masks in memory", "flag", "our choice: the score is not trained here")
    attention: Literal["eager", "sdpa"] = field("sdpa", "attention of the towers; the language model uses torch's "
        "fused kernels (model.aurora.shared_prompt)", "name", "our choice: exact and available everywhere")
    seg_token: str = field("[SEG]", "token whose hidden state prompts SAM", "text", "paper 3.1", pattern=r"^\S+$")
    prompter: Literal["seg_token", "learnable_tokens", "text_encoder"] = field("seg_token", "what prompts SAM: the "
        "[SEG] that the model writes, learnable tokens appended behind its answer, or a text encoder's embedding of "
        "the reference (no answer is written)", "name", "paper 3.1, tables 2 and 7")
    learnable_tokens: int = field(1, "tokens appended behind the answer; their projected states are averaged", "tokens",
        "our choice: one, as there is one [SEG]; paper 8.1 is silent", ge=1)
    text_encoder: Name | None = field(None, "folder of a CLIP text model with its tokenizer; null = the base's "
        "language model reads the reference", "path", "our choice: stands for ImageBind's CLIP text tower (paper table "
        "2)")
    system_prompt: Literal["llama2", "qwen2", "none"] = field("llama2", "system turn: LLaMA-2's safety text as "
        "released, Qwen2's own, or none", "name", "released code utils/sem_seg_dataset.py:513-519")
    decode_frames_per_step: int | None = field(None, "frames of a clip that get a mask loss in a step (drawn by seed); "
        "null = all", "frames", "released code LISA_sft_distill.py:186; the paper does not say it", ge=1)


class TrainableConfig(Section):
    """Which weights are trained. Patterns are searched (`re.search`) in the joint model's module or parameter names."""

    lora_rank: int = field(8, "rank of the LoRA adapters; 0 = no LoRA", "1", "released code train_ds.py:56", ge=0)
    lora_alpha: float = field(16.0, "LoRA's scale, divided by the rank", "1", "released code train_ds.py:92", gt=0)
    lora_dropout: float = field(0.05, "dropout before the adapters", "1", "released code train_ds.py:93", ge=0, lt=1)
    lora_targets: tuple[Regex, ...] = field((r"language_model\..*\.(q_proj|v_proj)$",), "regexes of the linear modules "
        "with an adapter; one without a match is an error. The released filter reaches BEATs and SAM's decoder too "
        "(train_ds.py:215,217)", "regex", "released code train_ds.py:94")
    full: tuple[Regex, ...] = field((r"language_model\.model\.embed_tokens\.", r"language_model\.lm_head\."),
        "regexes of the parameters trained whole; one without a match is an error", "regex",
        "released code train_ds.py:280")
    seg_head: bool = field(True, "train text_hidden_fcs, [SEG]'s projection", "flag", "released code train_ds.py:280")
    mask_decoder: bool = field(True, "train SAM's mask decoder", "flag", "released code train_ds.py:280")
    seg_rows_only: bool = field(False, "train only the [SEG] rows of embedding and lm_head (7k values, not 1.09 G)",
        "flag", "released code train_ds.py:280 trains all rows")


class DataConfig(Section):
    """What is read and how a row becomes a sample."""

    benchmark: Literal["refavs", "avsbench_s4", "avsbench_ms3"] = field("refavs", "which benchmark lies in `root`; "
        'AVSBench asks for "The sounding object" in every clip', "name", "paper 4.1, 4.4")
    root: Name = field("data/refavs", "folder of the benchmark (Ref-AVS: metadata.csv, media/, gt_mask/; AVSBench: see "
        "dataset/avsbench.py)", "path", "our choice: the path in this repository")
    cot: tuple[Name, ...] = field((), "JSONL files of reasoning records, keyed by metadata row; where any are listed, "
        "only rows with a record are trained on, whatever the answer holds", "paths", "paper 3.1")
    train_split: Literal["train", "val"] = field("train", "split that is trained on", "name", "paper 4.1")
    null_rows: bool = field(True, "keep the rows whose reference matches nothing (empty masks)", "flag",
        "released code utils/sem_seg_dataset.py:386-407")
    num_workers: int = field(4, "decoding processes per rank; 0 = decode in the training process", "processes",
        "our choice: decoding of 10 frames takes about 0.2 s on one core", ge=0)
    audio_padding_seconds: float | None = field(30.0, "length to which the sound is padded with silence (30 s: 1,496 "
        "audio tokens); null = none (10 s: 496 tokens)", "seconds", "released code utils/dataset.py:127", gt=0)
    frame_resize: Literal["warp", "pad"] = field("warp", "frames to the vision tower's square: stretched, or padded "
        "first", "name", "released code train_ds.py:177")
    frame_size: int | None = field(None, "side of the square frames, for a base that takes several (Qwen2.5-Omni: "
        "multiples of 28); null = its own", "pixels", "our choice: the size the base was made for", ge=14)
    num_frames: int | None = field(None, "frames read per clip, evenly spaced; null = all on disk (10)", "frames",
        "released code train_ds.py:175", ge=1)
    answer: Literal["reasoning", "conclusion", "class", "plain"] = field("reasoning", 'target text: "{reasoning} It is '
        '[SEG].", its last two sentences alone, "It is {class} [SEG]." or "It is [SEG]."', "name", "paper 3.1")
    incomplete_reasoning: Literal["error", "drop"] = field("error", "rows without a reasoning record, or with one of "
        "2,000 characters or more: refuse the run, or leave them out", "name", "our choice: no row goes unseen; "
        "released code utils/sem_seg_dataset.py:398 drops")
    feature_cache: Literal["none", "memory", "disk"] = field("none", "keep the features of frozen towers by clip, in "
        "memory or in files below <data.root>/.features (about 7 MB a clip at full size)", "name",
        "our choice: a cache pays only where clips come again")
    max_image_pixels: int = field(50_000_000, "larger frames or masks are refused before decoding", "pixels",
        "our choice: guards memory", ge=1)
    max_audio_seconds: float = field(120.0, "longer sounds are refused", "seconds", "our choice: guards memory", gt=0)


class OptimConfig(Section):
    """AdamW and its schedule. All step counts are optimiser steps."""

    lr: float = field(1e-4, "peak learning rate; the paper names none (GRPO: 1e-5, train_ds.py:88)", "1",
        "released code train_ds_test.py:87, the only trainer with a cross entropy", gt=0)
    betas: tuple[Average, Average] = field((0.9, 0.95), "AdamW's decay rates", "1", "released code train_ds.py:96")
    weight_decay: float = field(0.0, "decoupled weight decay", "1", "released code train_ds.py:332", ge=0)
    warmup_steps: int = field(100, "linear warm-up from 0", "steps", "released code train_ds_test.py:315", ge=0)
    steps: int = field(720, "length of the run", "steps", "paper 4.1", ge=1)
    decay_steps: int | None = field(None, "step at which the decay reaches 0; null = optim.steps, the end of the run",
        "steps", "our choice: a run of any length ends at a rate of 0", ge=1)
    schedule: Literal["linear", "cosine", "constant"] = field("linear", "decay to 0 at decay_steps after the warm-up",
        "name", "released code train_ds.py:337")
    clip_norm: float = field(1.0, "largest gradient norm; 0 = no clipping", "1", "released code train_ds.py:352", ge=0)
    group_lr_scale: dict[Regex, Annotated[float, Field(gt=0)]] = field({}, "regex on parameter names -> factor on lr; "
        "the first match counts", "1", "our choice: one rate for all")


class EngineConfig(Section):
    """How DeepSpeed runs the step."""

    micro_batch: int = field(1, "clips per process and forward", "clips", "paper 4.1", ge=1)
    accumulation: int = field(4, "forwards per optimiser step", "micro-batches", "paper 4.1", ge=1)
    zero_stage: Literal[0, 1, 2, 3] = field(2, "ZeRO stage", "1", "released code train_ds.py:354")
    precision: Literal["fp32", "bf16"] = field("bf16", "weights and matmuls", "name", "released code train_ds.py:48")
    accumulate_in: Literal["weights", "fp32"] = field("weights", "type in which the gradients of micro-batches are "
        "summed: the weights' own, or float32 (ZeRO 2 and 3); under bf16 the first is off by 0.2 % after 4, see "
        "docs/memory.md", "name", "released code train_ds.py:354 leaves DeepSpeed's default alone")
    gradient_checkpointing: bool = field(True, "recompute the language model's activations in backward", "flag",
        "released code train_ds.py:165")
    offload: bool = field(False, "keep the optimiser's states in CPU memory (released: true); 2 x 48 GB hold them",
        "flag", "our choice: faster where it fits; released code train_ds.py:358 offloads")
    threads: int | None = field(None, "CPU threads per process; null = cores / processes on this machine", "threads",
        "our choice: each core once", ge=1)


class LossConfig(Section):
    """Weights of the summed losses. The released code uses bce 2, dice 0.5 (train_ds.py:89-91); the paper 1 each."""

    ce: float = field(1.0, "weight of the cross entropy of the answer", "1", "paper eq. 6", ge=0)
    bce: float = field(1.0, "weight of the masks' binary cross entropy (released: 2)", "1", "paper eq. 6", ge=0)
    dice: float = field(1.0, "weight of the masks' Dice loss (released: 0.5)", "1", "paper eq. 6", ge=0)
    mask_side: int | None = field(None, "long side at which BCE and Dice are computed; null = the frames' own, as "
        "released (smaller: less memory)", "pixels", "released code LISA_sft_distill.py:370", ge=16)
    distill: float = field(0.0, "weight of MSE(f_t, f_s) of [SEG] features; stage sft alone distils (1)", "1",
        "paper eq. 2, 6", ge=0)


class LogConfig(Section):
    """What a run writes and how often."""

    every: int = field(1, "between two rows of metrics (means over the steps between)", "steps",
        "released code train_ds.py:106", ge=1)
    save_every: int = field(100, "between two checkpoints", "steps", "our choice: at most 100 steps are lost", ge=1)
    keep: int = field(2, "checkpoints kept; older ones go", "checkpoints", "our choice: one more if one is damaged",
        ge=1)
    keep_best: Name | None = field(None, "scalar of metrics.jsonl (loss, reward_all ...; its mean since the checkpoint "
        "before) by which the best checkpoint is kept besides; null = none", "name", "our choice: the last step counts")
    best_is: Literal["lowest", "highest"] = field("lowest", "which value of keep_best is the best", "name",
        "our choice: right for every loss")
    grace_seconds: float = field(120.0, "after SIGTERM (a scheduler takes the machine): time to finish the step and "
        "save; then the run ends without", "seconds", "our choice: SLURM's --signal=TERM@120", gt=0)
    tensorboard: bool = field(True, "write TensorBoard scalars", "flag", "released code train_ds.py:580")
    samples_every: int = field(0, "between two greedy answers for the clips at hand, written to samples.jsonl; 0 = "
        "never", "steps", "our choice: off, generation takes time", ge=0)


class WatchConfig(Section):
    """Thresholds of the warnings of `utils.log`; nothing here stops a run or changes what it learns."""

    window: int = field(50, "answers, or logged steps, that a judgement rests on", "1",
        "our choice: fewer move by chance", ge=2)
    repeated_share: float = field(0.9, "warn when the commonest answer makes up this share of the last ones", "1",
        "our choice: clips may share an answer, not nearly all of them", gt=0, le=1)
    seg_share: float = field(0.5, "warn when fewer of the last answers than this share hold [SEG]", "1",
        "our choice: an answer without [SEG] has no mask", ge=0, le=1)
    reward_drop: float = field(0.5, "warn when the mean reward falls below this share of its best window", "1",
        "our choice: half of what was reached is lost", ge=0, lt=1)
    entropy_floor: float = field(0.02, "warn when the mean entropy of a token falls below", "nat", "our choice: near 0 "
        "all answers are the same", ge=0)


class SftConfig(Section):
    """Stage 1: supervised reasoning with distillation from a segmentation-only teacher."""

    teacher_checkpoint: Name | None = field(None, "run or checkpoint folder of the teacher", "path", "paper 3.1")
    teacher_answer: Literal["conclusion", "class", "plain"] = field("class", 'answer the teacher reads: "It is {class} '
        '[SEG]." (released), "It is [SEG]." (paper text), or the last two sentences of the reasoning', "name",
        "released code LISA_ref_distill.py")
    student_start: Literal["teacher", "init_from"] = field("teacher", "weights that the student starts from: the "
        "teacher's, or those that init_from names (null = the base, whose [SEG] head is random)", "name",
        "released code train_ds.py:245-273 (commented) loads the teacher into both; the paper is silent")
    freeze_mask_decoder: bool = field(True, "use the teacher's SAM decoder and keep it frozen", "flag", "paper 3.1")


class ReflectiveConfig(Section):
    """Stage 2: training on wrong path + trigger + corrected path."""

    paths: tuple[Name, ...] = field((), "JSONL files of reflective records", "paths", "paper 3.2")
    loss_on: Literal["all", "correction"] = field("all", "tokens that count: the whole path, or what follows the "
        "trigger", "name", "paper eq. 3")
    target: Literal["reflective", "corrected_only"] = field("reflective", "whole reflective path (CRT) or the "
        "corrected path alone (CT)", "name", "paper table 4")
    reflective_count: int | None = field(1505, "reflective records mixed in; null = all", "records", "paper 4.1", ge=1)
    standard_count: int | None = field(3500, "records of data.cot mixed in; null = all", "records", "paper 4.1", ge=0)


class GrpoConfig(Section):
    """Stage 3: group-relative policy optimisation."""

    group_size: int = field(3, "answers sampled per clip", "answers", "paper 4.1", ge=2)
    temperature: float = field(1.0, "of sampling and scoring", "1", "released code LISA_grpo.py:432", gt=0)
    top_p: float = field(0.9, "probability mass sampled from", "1", "released code LISA_grpo.py:433", gt=0, le=1)
    top_k: int | None = field(None, "most likely words that are sampled from; 0 = all, null = as "
        "generation_config.json of model.base (else 50)", "words", "released code LISA_grpo.py:430-434 leaves it to "
        "transformers", ge=0)
    repetition_penalty: float | None = field(None, "divides logits of words the answer holds; 1 = none, null = as "
        "generation_config.json of model.base (else 1)", "1", "released code LISA_grpo.py:430-434 leaves it to "
        "transformers", gt=0)
    max_new_tokens: int = field(320, "longest answer (released: 150, which cuts reflective ones, LISA_grpo.py:434)",
        "tokens", "our choice: the two paths of paper 6.2's example have 148 words, about 200 tokens; the rest is room",
        ge=1)
    clip_eps: float = field(0.2, "the ratio is clipped below 1 - this", "1", "our choice: usual, eq. 5 is silent", gt=0,
        lt=1)
    clip_eps_high: float = field(0.2, "the ratio is clipped above 1 + this (DAPO: 0.28)", "1",
        "our choice: symmetric as eq. 5", gt=0)
    beta: float = field(0.0, "weight of the KL to the policy at the stage's start", "1", "paper 3.3", ge=0)
    updates_per_batch: int = field(1, "optimiser steps on one set of samples", "steps",
        "released code LISA_grpo.py:572", ge=1)
    advantage: Literal["std", "mean", "leave_one_out"] = field("std", "reward minus group mean over group std (eq. 4), "
        "without the std, or minus the others' mean", "name", "paper eq. 4")
    advantage_eps: float = field(1e-4, "added to the std", "1", "released code LISA_grpo.py:569", gt=0)
    normalisation: Literal["sequence", "token"] = field("sequence", "mean over each answer, then over answers (eq. 5), "
        "or over all tokens (DAPO)", "name", "paper eq. 5")
    mask_truncated: bool = field(False, "leave answers cut at max_new_tokens out of the policy loss", "flag",
        "released code LISA_grpo.py:575")
    mask_loss_on: Literal["all", "class_correct", "best", "none"] = field("all", "answers whose masks are trained (BCE "
        "+ Dice)", "name", "paper eq. 8")
    reward_weights: dict[Name, Annotated[float, Field(ge=0)]] = field({"format": 1.0, "iou": 1.0, "class": 1.0},
        "coefficient of each reward by name", "1", "paper 3.3")
    reward_module: str | None = field(None, "module that registers more rewards", "module",
        "our choice: the paper's rewards alone")
    class_scoring: Literal["exact", "released"] = field("exact", "class reward 0/1 by the whole name, or the released "
        "code's 0/1/2 by one word", "name", "paper 3.3")


class EvalConfig(Section):
    """What train_ds_test.py evaluates, and how."""

    checkpoint: Name | None = field(None, "run or checkpoint folder to evaluate", "path",
        "our choice: null, the user names it")
    splits: tuple[Literal["train", "val", "test", "test_s", "test_u", "test_n"], ...] = field(
        ("test_s", "test_u", "test_n"), "splits that are scored (AVSBench: test)", "names", "paper 4.1", min_length=1)
    protocol: tuple[Literal["official", "per_expression", "s4", "ms3"], ...] = field(("official", "per_expression"),
        "Ref-AVS's own scoring (256 px, 4 clips pooled, J at 0.4), AURORA's (native size, per clip, 0.5), and "
        "AVSBench's of its subsets s4 and ms3 (224 px, 4 clips pooled, 0.5)", "names", "Ref-AVS official code",
        min_length=1)
    batch_size: int = field(1, "clips at once per process", "clips", "released code train_ds_test.py:85", ge=1)
    max_new_tokens: int = field(512, "longest answer", "tokens", "our choice: reflective paths fit", ge=1)
    repetition_penalty: float | None = field(None, "of greedy answers: 1 = none, null = as generation_config.json of "
        "model.base (else 1), the only field of that file that reaches a greedy answer", "1",
        "released code LISA.py:195-200 leaves it to transformers", gt=0)
    probe: Literal["none", "shuffle_audio", "zero_audio", "shuffle_video"] = field("none", "exchange or silence one "
        "modality: does the model use it?", "name", "our choice: none, the benchmark's own clips are scored")
    limit: int | None = field(None, "rows scored per split, evenly spread; null = all", "rows", "paper 4.1", ge=1)
    pictures: int = field(12, "clips drawn into the report", "clips", "our choice: a page of the report", ge=0)
    save_masks: bool = field(False, "write every predicted mask as PNG", "flag", "our choice: the scores need none")
    save_probabilities: bool = field(False, "write every predicted mask's probabilities as 16-bit PNG "
        "(scripts/evaluate_masks.py)", "flag", "our choice: the scores need none")
    output_dir: Name = field("runs/eval", "folder of tables, pictures and predictions", "path",
        "our choice: a folder of its own")


class RunConfig(Section):
    """One run of one stage.

    Raises:
        pydantic.ValidationError: for a field of the wrong type or range, an unknown key or a broken rule between
            fields; `utils.config.load_config` turns it into a `ConfigError` that lists everything at once.
    """

    stage: StageName = field(..., "what the run does: the training stage of train_ds.py, or `eval` for "
        "train_ds_test.py", "name", "paper 3")
    seed: int = field(0, "seed of data order, dropout and sampling (each rank adds its number)", "1",
        "our choice: the paper names none", ge=0)
    output_dir: Name = field("runs/default", "folder of this run: checkpoints, metrics, final weights", "path",
        "our choice: runs lie together below runs/")
    init_from: str | None = field(None, "run or checkpoint folder whose trained weights the stage starts from; null = "
        "the base", "path", "paper 3.2")
    model: ModelConfig = ModelConfig()
    trainable: TrainableConfig = TrainableConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    loss: LossConfig = LossConfig()
    log: LogConfig = LogConfig()
    watch: WatchConfig = WatchConfig()
    sft: SftConfig = SftConfig()
    reflective: ReflectiveConfig = ReflectiveConfig()
    grpo: GrpoConfig = GrpoConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check_rules(self) -> RunConfig:
        problems = [
            (fields, tuple(attrgetter(name)(self) for name in fields.split(" + ")), what, remedy)
            for broken, fields, what, remedy in RULES if broken(self)
        ]  # fmt: skip
        if problems:
            text = "; ".join(f"{fields}: {what}. Remedy: {remedy}" for fields, _, what, remedy in problems)
            raise PydanticCustomError("broken_rules", "{text}", {"text": text, "problems": problems})
        return self
