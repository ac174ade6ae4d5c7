"""Will it fit? Memory per GPU of a run before anything is loaded, and the cheapest change if it does not.

    python scripts/plan_memory.py --config configs/grpo.yaml --gpus 2 --gpu-gb 48 [section.field=value ...]
    python scripts/plan_memory.py --markdown --config configs/*.yaml          # one row of a table for each file

The model is built on torch's meta device, so names and counts of trained weights are those of the run. What DeepSpeed
keeps is exact arithmetic (`engine_states`); what a step adds is a formula (`moments`), explained in docs/memory.md. GB
are 1e9 bytes. Exit status 1 if a run does not fit.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.rules import VOCABULARY  # noqa: E402 - the root must be on the path first
from configs.schema import EngineConfig, RunConfig  # noqa: E402
from model.aurora.build import build_meta_model, sizes_of_base  # noqa: E402
from model.aurora.model import AuroraModel  # noqa: E402
from model.aurora.trained import trained_names  # noqa: E402
from model.objectives.mask import loss_shape  # noqa: E402
from model.objectives.policy import CHUNK  # noqa: E402
from model.segmenters.base import Segmenter  # noqa: E402
from model.segmenters.sam2 import Sam2Segmenter  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.errors import ConfigError, run_command  # noqa: E402
from utils.tables import format_table  # noqa: E402

GB = 1e9
REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size: values per buffer, allocated whole however little is trained."""
ZERO3_LIVE = 1_050_000_000
"""DeepSpeed's stage3_max_live_parameters plus its prefetch bucket: values that ZeRO-3 may hold gathered at once."""
DECODER_TRAINED, DECODER_FROZEN = 26, 17
"""Values that SAM's mask decoder saves for backward per value of a frame's image embedding (counted, see the tests)."""
SAM2_TRAINED, SAM2_FROZEN, SAM2_MEMORY = 29, 21, 313
"""Likewise of SAM 2, per value of its coarsest map; what reading a full memory adds (counted, see the tests)."""
ANSWER_TOKENS = {"teacher": 12, "sft": 512, "reflective": 1024}
"""Longest answer in tokens. A reasoning has fewer than 2,000 characters (longer ones are dropped, released code
sem_seg_dataset.py:402), about four to the token; a reflective path holds two. GRPO and evaluation: max_new_tokens."""


@dataclass(frozen=True)
class Workload:
    """The largest batch that one process has in hand at once."""

    clips: int
    group: int = 1
    """Answers per clip that are trained together."""
    frames: int = 10
    frame_size: tuple[int, int] = (720, 1280)
    """Native (height, width) at which the mask losses are computed; the largest that is common in Ref-AVS."""
    audio_seconds: float = 10.0
    """Length of the sound, padding included."""
    prompt_tokens: int = 200
    """Text of the prompt: about 160 with the llama2 system text, plus the reference."""
    answer_tokens: int = 512

    @classmethod
    def of_stage(cls, config: RunConfig, **changes: object) -> Workload:
        """Micro-batch, group, frames and longest answer of a run; `changes` that are not None win."""
        longest = {"grpo": config.grpo.max_new_tokens, "eval": config.eval.max_new_tokens, **ANSWER_TOKENS}
        short = config.stage in ("sft", "reflective") and config.data.answer != "reasoning"
        work = cls(
            clips=config.eval.batch_size if config.stage == "eval" else config.engine.micro_batch,
            group=config.grpo.group_size if config.stage == "grpo" else 1,
            frames=config.data.num_frames or cls.frames,
            audio_seconds=config.data.audio_padding_seconds or cls.audio_seconds,
            answer_tokens=longest["teacher" if short else config.stage],
        )
        return replace(work, **{name: value for name, value in changes.items() if value is not None})


def fbank_frames(seconds: float) -> int:
    """Filter-bank frames of a sound at 16 kHz: windows of 25 ms every 10 ms."""
    return 1 + (round(seconds * 16_000) - 400) // 160


@dataclass(frozen=True)
class Machine:
    """The GPUs, and what a plan assumes."""

    gpus: int
    limit: int
    """Bytes of one."""
    reserve: int = round(2 * GB)
    """Bytes for CUDA context, NCCL, kernel workspaces and fragmentation."""
    lengths: dict[str, object] = field(default_factory=dict)
    """Fields of `Workload` (None: by the stage)."""


@dataclass(frozen=True)
class Plan:
    """The answer for one run; bytes per GPU."""

    stays: dict[str, int]
    moments: dict[str, dict[str, int]]
    """Part of a step -> term -> what it adds at its height."""
    limit: int
    cpu: int = 0
    """CPU memory of one process for offloaded states."""

    @property
    def peaks(self) -> dict[str, int]:
        """Part of a step -> everything at its height."""
        return {name: sum(self.stays.values()) + sum(terms.values()) for name, terms in self.moments.items()}

    @property
    def total(self) -> int:
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def engine_states(trained: Sequence[int], values: int, e: int, gpus: int, engine: EngineConfig) -> dict[str, int]:
    """Bytes that DeepSpeed 0.19 keeps on one GPU by ZeRO stage, and those of its two special moments.

    With e bytes per weight, P trained and A all values, W GPUs, b = REDUCE_BUCKET values:

    | ZeRO | weights | gradients | master, two moments (bf16) | buffers of backward | step: more in the optimiser's |
    |---|---|---|---|---|---|
    | 0 | eA | eP | 4P + 8P | - | 4P gradient, 4P of AdamW |
    | 1 | eA | eP + e own | (4P + 8P) / W | eb + flattened copy | (4P + 4P) / W |
    | 2 | eA | e own, twice when accumulating | (4P + 8P) / W | 2eb + flattened copy | (eP + 4P + 4P) / W |
    | 3 | eA/W + live | eP/W | (4P + 8P) / W | eb + flattened copy | (4P + 4P) / W |

    `own`: a rank keeps the gradients of every parameter that its share touches, whole. In float32 ZeRO 0 has no master.

    Args:
        trained: values of each trained parameter, in order; empty for evaluation.
        values: of all parameters.
        e: bytes per weight.
        gpus: processes.
        engine: ZeRO stage, accumulation and offload.
    """
    total, zero, stays = sum(trained), engine.zero_stage, {"weights": values * e, "buffers": 0, "step": 0, "cpu": 0}
    if not total:
        return stays | {"gradients": 0, "optimiser": 0}
    if zero == 0:
        master = 4 if e == 2 else 0
        return stays | {"gradients": total * e, "optimiser": (master + 8) * total, "step": (master + 4) * total}
    share = 2 * -(-total // (2 * gpus))  # padded, so that each share begins at an even value
    touched = [0] * gpus
    for size, end in zip(trained, itertools.accumulate(trained), strict=True):
        for rank in range((end - size) // share, (end - 1) // share + 1):
            touched[rank] += size
    own, copy = max(touched) * e, min(total, max(REDUCE_BUCKET, *trained)) * e
    if zero == 3:
        share = sum(-(-size // gpus) for size in trained)  # each parameter is cut and padded by itself
        stays["weights"], copy = (-(-values // gpus) + min(values, ZERO3_LIVE)) * e, min(total, REDUCE_BUCKET) * e
    stays["buffers"] = (2 if zero == 2 else 1) * REDUCE_BUCKET * e + copy
    if engine.offload:
        return stays | {"gradients": max(trained) * e, "optimiser": 0, "cpu": (16 + e) * share}
    gradients = {1: total * e + own, 2: own * (2 if engine.accumulation > 1 else 1), 3: share * e}[zero]
    return stays | {"gradients": gradients, "optimiser": 12 * share, "step": (8 + e * (zero == 2)) * share}


def moments(config: RunConfig, model: AuroraModel, work: Workload) -> dict[str, dict[str, int]]:
    """What each part of a step adds to what stays: part -> term -> bytes, without DeepSpeed's buffers.

    Every term is a product of sizes, explained in docs/memory.md. Trained towers are not counted.
    """
    sizes, e, clips, group = model.backbone.config, model.backbone.dtype.itemsize, work.clips, work.group
    words, width, mlp = sizes.language.vocab_size, sizes.language.hidden_size, sizes.language.intermediate_size
    layers, kv_width = sizes.language.num_hidden_layers, width * sizes.language.num_key_value_heads
    # Some backbones take frames of several sizes; the others have one.
    side = [config.data.frame_size] if config.data.frame_size and model.backbone.media_format.frame_step else []
    video = sizes.video_tokens(work.frames, *side)
    prompt = video + sizes.audio_tokens(fbank_frames(work.audio_seconds)) + work.prompt_tokens
    tokens, own = clips * (prompt + group * work.answer_tokens), clips * group * work.answer_tokens

    def unsaved(count: int) -> int:  # a layer without gradient: gate, SiLU, up; norm, queries, keys, values, output
        return clips * count * e * (3 * mlp + 5 * width)

    found = {"towers": tower_peak(config, model, work)}
    if config.stage == "sft" and config.loss.distill > 0:
        found["teacher's pass"] = {"one layer": unsaved(prompt + ANSWER_TOKENS["teacher"])}
    if config.stage in ("grpo", "eval"):
        cache = tokens * layers * 2 * e * kv_width // sizes.language.num_attention_heads
        scores = 24 * clips * group * words  # logits in float32, and what sorting them for top-p takes
        found["answers"] = {"KV cache": cache, "prompt, one layer": unsaved(prompt), "scores": scores}
    if config.stage == "eval":
        return found
    saved = layer_saves(config, model, work, prompt)
    if config.engine.gradient_checkpointing:
        kept, again = {"hidden states": layers * tokens * width * e}, sum(saved.values())
    else:
        kept, again = {f"layers: {name}": layers * size for name, size in saved.items()}, 0
    kept["embeddings and final norm"] = tokens * width * (3 * e + 4)
    chunk = min(own, CHUNK) if config.stage == "grpo" else own  # SFT scores all its words at once
    frames = min(config.model.decode_frames_per_step or work.frames, work.frames)
    height, across = loss_shape(work.frame_size, config.loss.mask_side)
    masks = clips * group * (frames * 16 * height * across + e * decoder_saves(model, frames))
    logits = {"logits": 12 * chunk * words}  # with log-softmax and gradient: 2 + 4 + 4 + 2 bytes in bf16, 4 + 4 + 4
    largest = e * max(p.numel() for p in model.parameters() if p.requires_grad)
    found["forward and backward"] = kept | max(
        {"masks": masks, "losses of one mask": 12 * frames * height * across},
        logits | ({} if config.stage == "grpo" else {"masks": masks}),  # GRPO decodes masks last, so they go first
        {"one layer again": again, "gradients in a layer": 3 * tokens * mlp * e},
        {"gradient of the largest weight": largest * (3 if own > chunk else 1)},  # of two chunks, and the sum
        key=lambda terms: sum(terms.values()),
    )
    return found


def decoder_saves(model: AuroraModel, frames: int) -> int:
    """Values that the mask decoder saves for backward of one query; SAM 2 recomputes one frame at a time."""
    sam, frozen = model.segmenter, model.is_frozen("segmenter.sam.mask_decoder")
    if isinstance(sam, Sam2Segmenter):
        frame = (SAM2_FROZEN if frozen else SAM2_TRAINED) + SAM2_MEMORY * (sam.memory != "none")
        # The frame's features are selected again; of every frame stay logits, memory and pointer, half a map at most.
        return (frame + 4 + frames // 2) * sam.feature_size // 4
    embedding = (sam.image_size // sam.sizes.patch_size) ** 2 * sam.prompt_width
    return frames * (DECODER_FROZEN if frozen else DECODER_TRAINED) * embedding


def encoder_peak(sam: Segmenter, frames: int, e: int) -> int:
    """Bytes of the segmenter's encoder: all frames in float32 and cast, and what a chunk of them takes inside."""
    pixels, chunk = frames * 3 * sam.image_size**2 * (4 + e), min(frames, sam.frames_per_chunk)
    if isinstance(sam, Sam2Segmenter):  # GELU's input and output, and the sum that it is added to
        return pixels + e * (3 * chunk * sam.widest + frames * sam.feature_size)
    grid = (sam.image_size // sam.sizes.patch_size) ** 2
    return pixels + chunk * grid * e * (3 * sam.sizes.encoder_heads * grid + 10 * sam.sizes.encoder_width)


def tower_peak(config: RunConfig, model: AuroraModel, work: Workload) -> dict[str, int]:
    """The highest of the frozen towers and its bytes; what stays of all of them is small beside that."""
    sizes, sam, frames = model.backbone.config, model.segmenter, work.clips * work.frames
    e = model.backbone.dtype.itemsize
    sounds, eager = fbank_frames(work.audio_seconds), config.model.attention == "eager"
    peaks = {
        **sizes.tower_bytes(work.clips, work.frames, sounds, e, eager),
        "SAM's encoder": encoder_peak(sam, frames, e),
    }
    return {name: size for name, size in peaks.items() if size == max(peaks.values())}


def layer_saves(config: RunConfig, model: AuroraModel, work: Workload, prompt: int) -> dict[str, int]:
    """Bytes that one layer of the language model saves for backward, by kind; prompts have `prompt` tokens."""
    language, e, group = model.backbone.config.language, model.backbone.dtype.itemsize, work.group
    width, heads = language.hidden_size, language.num_attention_heads
    own, length = group * work.answer_tokens, prompt + work.answer_tokens
    # Behind a mask (padding; the answers of a group behind their prompt) keys and values are repeated for every head.
    seen = prompt**2 + own * length if group > 1 else length**2
    repeated = length * (group if group > 1 else work.clips > 1)
    plain = prompt if group > 1 else 0 if repeated else length
    dropped = config.stage != "grpo" and config.trainable.lora_dropout > 0
    inputs = {}
    for name, weight in model.backbone.language_model.model.layers[0].named_parameters():
        if weight.requires_grad and (weight.dim() == 2 or "norm" in name) and ".lora_B." not in name:
            copied = dropped and ".lora_A." in name  # dropout: a copy for each adapter, and its mask of bytes
            key = name if copied or "norm" in name else (name.split(".")[0], weight.shape[-1])
            inputs[key] = weight.shape[-1] * (e + copied)  # layers of one input save it once
    tokens = work.clips * (prompt + own)
    return {
        "norms in float32": tokens * 2 * 4 * width,
        "attention": 2 * e * (tokens * width + work.clips * plain * width * language.num_key_value_heads // heads)
        + work.clips * (2 * e * width * repeated + seen * (repeated > 0)),
        "gate, SiLU, up": tokens * 3 * language.intermediate_size * e,
        "inputs of trained weights": tokens * sum(inputs.values()),
    }


@functools.lru_cache(maxsize=8)
def meta_model(run: str) -> AuroraModel:
    """The model of a run's JSON, kept: many changes leave it as it is."""
    return build_meta_model(RunConfig.model_validate_json(run))


def make_plan(config: RunConfig, machine: Machine) -> Plan:
    """Lay a run out on a machine.

    Raises:
        ConfigError: SAM's type or size is wrong, or a pattern of `trainable` matches nothing.
    """
    bare = {"engine": EngineConfig(precision=config.engine.precision)}
    model = meta_model(config.model_copy(update=bare).model_dump_json())
    trained, e = [p.numel() for p in model.parameters() if p.requires_grad], model.backbone.dtype.itemsize
    states = engine_states(trained, sum(p.numel() for p in model.parameters()), e, machine.gpus, config.engine)
    added = moments(config, model, Workload.of_stage(config, **machine.lengths))
    if trained:
        added["optimiser step"] = {"gradients and moments in float32": states["step"]}
        for name in ("towers", "forward and backward"):  # the buffers of one backward last into the next forward
            added[name]["gradient buffers"] = states["buffers"]
    other = 0
    if config.stage == "sft" and config.loss.distill > 0:  # the teacher: a light checkpoint like the student's
        named = dict(model.named_parameters())
        other = sum(named[name].numel() for name in trained_names(model)) * e
    elif config.stage == "grpo" and config.grpo.beta > 0:
        other = sum(trained) * e
    stays = {"weights": states["weights"], "gradients": states["gradients"], "optimiser": states["optimiser"],
             "teacher or reference": other, "reserve": machine.reserve}  # fmt: skip
    return Plan(stays, added, machine.limit, states["cpu"])


Change = tuple[tuple[str, ...], str]
"""Overrides as on a command line, and what they cost."""


def changes(config: RunConfig, gpus: int) -> Iterator[Change]:
    """What would need less memory, from what costs nothing to what costs most; only what is not so already."""
    e, m, trains = config.engine, config.model, config.stage != "eval"
    if not trains and config.eval.batch_size > 1:
        yield ("eval.batch_size=1",), "slower generation"
    for zero in (2, 1, 0):  # a lower stage needs less where little is trained: its buffers are smaller
        if trains and zero != e.zero_stage and not (e.offload and zero == 0):
            yield (f"engine.zero_stage={zero}",), "nothing but communication"
    if trains and not e.gradient_checkpointing:
        yield ("engine.gradient_checkpointing=true",), "a third more compute in the language model"
    if trains and e.micro_batch > 1:
        halved = (f"engine.micro_batch={e.micro_batch // 2}", f"engine.accumulation={2 * e.accumulation}")
        yield halved, "smaller forwards: slower, the same batch per step"
    if trains and config.loss.mask_side is None:
        yield ("loss.mask_side=512",), "mask losses at 512 pixels instead of the native size"
    if trains and (m.decode_frames_per_step or 10) > 4:
        yield ("model.decode_frames_per_step=4",), "mask losses on 4 drawn frames of a clip instead of all"
    rest = [pattern for pattern in config.trainable.full if not any(re.search(pattern, name) for name in VOCABULARY)]
    if trains and len(rest) < len(config.trainable.full):
        lean = ("trainable.seg_rows_only=true", f"trainable.full={json.dumps(rest)}")
        yield lean, "of the vocabulary only [SEG] is learned (configs/lean)"
    if config.data.audio_padding_seconds is not None:
        yield ("data.audio_padding_seconds=null",), "496 audio tokens instead of 1,496, unlike the released code"
    smaller = 224 if m.segmenter == "sam" else 512
    if m.sam_image_size > smaller:
        yield (f"model.sam_image_size={smaller}",), "coarser masks" + ", as in the released code" * (smaller == 224)
    if config.stage == "grpo" and config.grpo.group_size > 2:
        yield ("grpo.group_size=2",), "a group of 2: noisier advantages"
    if trains and e.zero_stage < 3 and gpus > 1:
        yield ("engine.zero_stage=3", "log.samples_every=0"), "weights are gathered layer by layer: slower"
    if trains and not e.offload:  # refused at ZeRO 0, allowed beside a higher stage
        yield ("engine.offload=true",), "optimiser on the CPU: slow steps, as in the released code"


def cheapest(listed: Sequence[Change], plan_with: Callable[[tuple[str, ...]], Plan | None]) -> list[Change]:
    """The first single change that makes a plan fit; else several, none of which could be left out; [] if none does.

    Several are gathered in order, each in the place of earlier ones that set the same field, as long as the total does
    not rise; then those that are not needed are dropped, the dearest first.

    Args:
        listed: the cheapest first.
        plan_with: overrides -> plan, or None where the configuration refuses them.
    """

    def attempt(parts: Sequence[Change]) -> Plan | None:
        return plan_with(tuple(text for overrides, _ in parts for text in overrides))

    def fits(parts: Sequence[Change]) -> bool:
        plan = attempt(parts)
        return plan is not None and plan.fits

    def fields(change: Change) -> set[str]:
        return {text.partition("=")[0] for text in change[0]}

    single = next((change for change in listed if fits([change])), None)
    if single is not None:
        return [single]
    taken: list[Change] = []
    least = attempt(taken)
    for change in listed:
        parts = [*(earlier for earlier in taken if not fields(earlier) & fields(change)), change]
        plan = attempt(parts)
        if plan is not None and (least is None or plan.total <= least.total):
            taken, least = parts, plan
    if not fits(taken):
        return []
    for change in reversed(taken):
        parts = [other for other in taken if other is not change]
        taken = parts if fits(parts) else taken
    return taken


def planned(path: Path, overrides: Sequence[str], machine: Machine) -> Plan | None:
    """The plan of a file under overrides; None where the configuration refuses them."""
    try:
        return make_plan(load_config(path, overrides), machine)
    except ConfigError:
        return None


def report(path: Path, overrides: Sequence[str], machine: Machine, exhausted: bool) -> bool:
    """Print what a run keeps, where it peaks, what other ZeRO stages need, and a remedy; returns whether it fits."""
    config = load_config(path, overrides)
    plan = make_plan(config, machine)
    rows = [["stays", name, gb(size)] for name, size in plan.stays.items() if size]
    for moment, terms in plan.moments.items():
        rows += [[moment, name, gb(size)] for name, size in terms.items() if size]
        rows.append(["", "with what stays", gb(plan.peaks[moment])])
    print(f"{path}: stage {config.stage} on {machine.gpus} x {gb(machine.limit)} GB, "
          f"sizes of {sizes_of_base(config)[1]}\n")  # fmt: skip
    print(format_table(["part of a step", "term", "GB"], rows))
    if config.stage != "eval":
        others = {zero: [f"engine.zero_stage={zero}", *["log.samples_every=0"] * (zero == 3)] for zero in range(4)}
        rows = [[str(zero), *cells(path, [*overrides, *more], machine)] for zero, more in others.items()]
        print("\n" + format_table(["ZeRO", *COLUMNS], rows))
    highest = max(plan.peaks, key=plan.peaks.__getitem__)
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {gb(plan.total - plan.limit)} GB too much"
    print(f"\n{gb(plan.total)} GB of {gb(plan.limit)} at the height of '{highest}': {verdict}")
    if plan.cpu:
        print(f"{gb(plan.cpu)} GB of CPU memory per process for the offloaded states")
    if not plan.fits or exhausted:
        # A run that ran out of memory needs more than its plan (longer answers, larger frames): a tenth less at least.
        goal = replace(machine, limit=min(machine.limit, round((0.9 if exhausted else 1) * plan.total)))
        remedy = cheapest([*changes(config, machine.gpus)], lambda more: planned(path, [*overrides, *more], goal))
        print("The cheapest change:" if remedy else "No change is enough: more or larger GPUs are needed.")
        print("\n".join(f"  {' '.join(more)}   # {cost}" for more, cost in remedy))
    return plan.fits


COLUMNS = ("weights", "gradients", "optimiser", "teacher", "backward", "opt. step", "checkpointed", "not")
"""Of a run, GB: what stays; what backward and the optimiser's step add; totals with gradient checkpointing and not."""


def cells(path: Path, overrides: Sequence[str], machine: Machine) -> list[str]:
    """One run in the columns of COLUMNS; - where the configuration refuses it, ! where it does not fit."""
    plans = [planned(path, [*overrides, f"engine.gradient_checkpointing={on}"], machine) for on in ("true", "false")]
    if plans[0] is None or plans[1] is None:
        return ["-"] * len(COLUMNS)
    stays, added = plans[0].stays, plans[0].moments
    parts = [sum(added.get(name, {}).values()) for name in ("forward and backward", "optimiser step")]
    return [*map(gb, [*list(stays.values())[:4], *parts]), *(gb(p.total) + "!" * (not p.fits) for p in plans)]


def gb(size: float) -> str:
    """Bytes as GB."""
    return f"{size / GB:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", required=True, help="YAML files of stages")
    parser.add_argument("--gpus", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--gpu-gb", type=float, default=48.0, help="memory of one, 1e9 bytes (default: %(default)s)")
    parser.add_argument("--reserve-gb", type=float, default=2.0, help="kept for what is not counted (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, help="longest answer (default: by the stage)")
    parser.add_argument("--prompt-tokens", type=int, help="text of the prompt (default: 200)")
    parser.add_argument("--frame-size", type=_size, help="native frames as HEIGHTxWIDTH (default: 720x1280)")
    parser.add_argument("--exhausted", action="store_true", help="the run ran out of memory: name a change anyway")
    parser.add_argument("--markdown", action="store_true", help="print one row of a table for each file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: at least one is needed")
    given = [*options.config, *options.overrides]  # overrides right behind --config land in it
    files, overrides = [Path(x) for x in given if "=" not in x], [x for x in given if "=" in x]
    lengths = {name: getattr(options, name) for name in ("answer_tokens", "prompt_tokens", "frame_size")}
    machine = Machine(options.gpus, round(options.gpu_gb * GB), round(options.reserve_gb * GB), lengths)

    def plan() -> int:
        if not options.markdown:
            return 0 if all([report(path, overrides, machine, options.exhausted) for path in files]) else 1
        print("| config | " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * len(COLUMNS) + "|")
        print("\n".join(f"| `{path}` | " + " | ".join(cells(path, overrides, machine)) + " |" for path in files))
        return 0

    return run_command(plan, failed=2)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
