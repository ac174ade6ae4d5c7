"""What a stage needs in memory, measured on the meta device: the stage's own modules at the run's real shapes.

Towers, language model, mask decoder and losses are run forward and backward without weights while `LiveBytes` counts
(utils/live_memory.py). Only the lines between them are written again here, because a mask of positions cannot be
evaluated without values: the L answer tokens of a row are taken to be its last ones.

GRPO is measured as it runs: the prompt read once for a group (`shared_prompt.score_answers`), logits in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from configs.schema import RunConfig
from model.aurora.meta import build_meta_model
from model.aurora.model import AuroraModel
from model.aurora.shared_prompt import score_answers
from model.aurora.trained import trained_names
from model.objectives.mask import loss_shape, mask_losses, shrink_target
from model.objectives.policy import token_log_probs
from model.stages.base import cross_entropy
from model.stages.workload import ANSWER_TOKENS, Workload, fbank_frames
from model.videollama2.config import VideoLlama2Config
from utils.live_memory import LiveBytes, fused_attention, gradients_dropped
from utils.memory_plan import Footprint, Phase
from utils.types import AuroraOutput, Batch, MediaFeatures, PackedInputs, Sample


def measure(
    config: RunConfig,
    sizes: VideoLlama2Config | None = None,
    work: Workload | None = None,
    model: AuroraModel | None = None,
) -> Footprint:
    """The footprint of one process.

    Args:
        config: the run; `engine.gradient_checkpointing` is measured both ways.
        sizes: of the backbone; None = those of `model.base`, or the released ones where it is not there.
        work: None = `Workload.of_stage(config)`.
        model: on the meta device; None = built from config and sizes.

    Raises:
        ConfigError: see `build_meta_model`.
    """
    work = Workload.of_stage(config) if work is None else work
    model = build_meta_model(config, sizes) if model is None else model
    element = torch.empty((), dtype=model.backbone.dtype).element_size()
    weights = {
        name: sum(p.numel() for p in model.get_submodule(name).parameters()) * element for name in model.components
    }
    own = config.engine.gradient_checkpointing and config.stage != "eval"
    phases = {}
    for checkpointing in (True, False) if config.stage != "eval" else (False,):
        model.backbone.set_gradient_checkpointing(checkpointing)
        phases[checkpointing] = tuple(_phases(model, config, work))
    changed = [p for p in model.parameters() if p.requires_grad]
    parts = {name: model.get_submodule(name).parameters() for name in model.components}
    distils = config.stage == "sft" and config.loss.distill > 0
    return Footprint(
        stage=config.stage,
        weights=weights,
        trained=tuple(p.numel() for p in changed),
        element=element,
        phases=phases[own],
        other_phases=phases.get(not own, phases[own]),
        checkpointing=own,
        teacher=_teacher_values(model) * element if distils else 0,
        trained_by={name: sum(p.numel() for p in part if p.requires_grad) for name, part in parts.items()},
    )


def _phases(model: AuroraModel, config: RunConfig, work: Workload) -> list[Phase]:
    """Every part of a step at its height."""
    trains = config.stage != "eval"
    found = [_tracked("towers", model, lambda: _encode(model, work))]
    if config.stage == "sft" and config.loss.distill > 0:
        found.append(_tracked("teacher's pass", model, lambda: _teacher_pass(model, work)))
    if config.stage in ("grpo", "eval"):
        found.append(_rollout(model, work, sampled=config.stage == "grpo"))
    if trains:
        model.train(config.stage != "grpo")  # GRPO scores in eval mode, so that the first ratio is 1
        with gradients_dropped(model.parameters()):
            found.append(_tracked("forward and backward", model, lambda: _step(model, config, work), backward=True))
        model.train()
    return found


def _tracked(name: str, model: AuroraModel, run: Callable[[], object], backward: bool = False) -> Phase:
    known = [*model.parameters(), *model.buffers()]
    vocabulary = model.backbone.config.language.vocab_size
    with torch.set_grad_enabled(backward), fused_attention(), LiveBytes(known, vocabulary) as live:
        kept = run()
        del kept
    activations = live.peak - live.logits_at_peak
    return Phase(name, activations, live.logits_at_peak, backward=backward, most_logits=live.logits_peak)


def _encode(model: AuroraModel, work: Workload, masks: bool = True) -> MediaFeatures:
    """The towers as `AuroraModel.encode` runs them, on clips without values."""
    return model.encode(_batch(model, work), masks=masks)


def _teacher_pass(model: AuroraModel, work: Workload) -> Tensor:
    """As `stages.sft._SegPass`: the teacher reads its short answer, without lm_head and masks."""
    media = _encode(model, work, masks=False)
    packed = _packed(model, work.clips, media, work.prompt_tokens, ANSWER_TOKENS["teacher"])
    return model.seg_features(_hidden(model, packed, media), packed)


def _rollout(model: AuroraModel, work: Workload, sampled: bool) -> Phase:
    """Prefill of the prompts beside the features of the clips; the cache at its longest."""
    language = model.backbone.config.language
    element = torch.empty((), dtype=model.backbone.dtype).element_size()

    def prefill() -> object:
        media = _encode(model, work)
        packed = _packed(model, work.clips, media, work.prompt_tokens, 0)
        hidden = _hidden(model, packed, media)
        rows = work.clips * work.group
        logits = model.backbone.language_model.lm_head(hidden[:, -1].repeat_interleave(work.group, 0))
        scores = logits.float().log_softmax(-1)
        kept = [media, scores]
        if sampled:  # top-p: sorted scores, their order, masses
            ordered, order = scores.sort(dim=-1, descending=True)
            kept += [ordered, order, ordered.exp().cumsum(-1) - ordered.exp()]
        if not sampled:
            low = model.decode_masks(
                logits.new_empty(rows, model.segmenter.prompt_width), _flags(rows), media.image_embeddings
            )
            kept.append(_upscaled(model, low[0], work))
        return kept

    tokens = _media_tokens(model, work) + work.prompt_tokens + work.group * work.answer_tokens  # PromptCache
    per_token = 2 * language.num_hidden_layers * language.num_key_value_heads * element
    head = language.hidden_size // language.num_attention_heads
    found = _tracked("rollout" if sampled else "answer and masks", model, prefill)
    cache = work.clips * tokens * per_token * head
    return replace(found, kv_cache=cache)


def _step(model: AuroraModel, config: RunConfig, work: Workload) -> None:
    """Forward and backward of one micro-batch."""
    media = _encode(model, work)
    total = _loss(model, config, work, media)
    if config.stage != "grpo":  # whose rollouts keep the features of their clips
        del media
    if total.requires_grad:
        total.backward()


def _loss(model: AuroraModel, config: RunConfig, work: Workload, media: MediaFeatures) -> Tensor:
    """`AuroraModel.forward` and the losses of the stage.

    In the order of the code, since backward begins with what was computed last while the rest is still held.
    """
    grpo = config.stage == "grpo"
    states, seg = (_read_group if grpo else _read_rows)(model, media, work)
    labels, has_seg = _integers(len(states)), _flags(work.clips * work.group)
    lm_head = model.backbone.language_model.lm_head
    scores = token_log_probs(lm_head, states, labels)[0] if grpo else lm_head(states)
    features = model.project(seg).masked_fill(~has_seg[:, None], 0)
    images = media.repeat(work.group).image_embeddings if work.group > 1 else media.image_embeddings
    chosen = config.model.decode_frames_per_step
    index = None if chosen is None or chosen >= work.frames else _integers(len(seg), chosen)
    low = model.decode_masks(features, has_seg, images, index)
    total = _mask_loss(model, config, work, low)
    if grpo:
        total = scores.mean() + total
    else:
        total = cross_entropy(AuroraOutput(states, scores, labels, features, has_seg, low)) + total
    if config.stage == "sft" and config.loss.distill > 0:
        total = total + (features - torch.empty_like(features)).square().mean()
    return total


def _read_rows(model: AuroraModel, media: MediaFeatures, work: Workload) -> tuple[Tensor, Tensor]:
    """States that predict the answers [B*L,D], and those at [SEG] [B,D]."""
    packed = _packed(model, work.clips, media, work.prompt_tokens, work.answer_tokens)
    hidden = _hidden(model, packed, media)
    return hidden[:, -work.answer_tokens - 1 : -1].flatten(0, 1), hidden[:, -1]


def _read_group(model: AuroraModel, media: MediaFeatures, work: Workload) -> tuple[Tensor, Tensor]:
    """The same for B * G answers behind B prompts, as `group.group_forward`."""
    decoder = model.backbone.language_model.model
    packed = _packed(model, work.clips, media, work.prompt_tokens, 0)
    prompt = model.backbone.embed(packed, media)
    answers = decoder.embed_tokens(_integers(work.clips * work.group, work.answer_tokens))
    hidden = score_answers(decoder, prompt, packed.attention_mask, answers, work.group)
    return hidden.flatten(0, 1), hidden[:, -1]


def _mask_loss(model: AuroraModel, config: RunConfig, work: Workload, low: Tensor) -> Tensor:
    """As `stages.base.answer_mask_losses`, every answer with a [SEG]."""
    predicted = [_upscaled(model, logits, work, config.loss.mask_side) for logits in low]
    truth = [torch.empty(low.shape[1], *work.frame_size, dtype=torch.bool, device="meta") for _ in range(work.clips)]
    targets = [shrink_target(truth[i // work.group], tuple(p.shape[-2:])) for i, p in enumerate(predicted)]
    losses = mask_losses(predicted, targets)
    return losses.bce + losses.dice


def _hidden(model: AuroraModel, packed: PackedInputs, media: MediaFeatures) -> Tensor:
    """`AuroraModel.hidden_states` of rows without padding, whose mask a fused kernel does not need."""
    embeddings = model.backbone.embed(packed, media)
    decoder = model.backbone.language_model.model
    mask = {"full_attention": None}
    return decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


def _upscaled(model: AuroraModel, low: Tensor, work: Workload, longest: int | None = None) -> Tensor:
    """[T,4h,4w] -> [T,H,W] at the frames' own size, or with the long side at `longest`."""
    height, width = work.frame_size
    side = model.segmenter.image_size
    scale = side / max(height, width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    return model.segmenter.upscale(low, inner, loss_shape(work.frame_size, longest))


def _media_tokens(model: AuroraModel, work: Workload) -> int:
    config = model.backbone.config
    return config.video_tokens(work.frames) + config.audio_tokens(fbank_frames(work.audio_seconds))


def _batch(model: AuroraModel, work: Workload) -> Batch:
    """Clips without values."""
    config, side = model.backbone.config, model.segmenter.image_size
    nothing = torch.empty(0, dtype=torch.int64)
    size = config.vision.image_size
    with torch.device("meta"):
        pixels = torch.empty(work.clips, work.frames, 3, size, size)
        sam = torch.empty(work.clips, work.frames, 3, side, side)
        fbank = torch.empty(work.clips, fbank_frames(work.audio_seconds), config.beats.mel_bins)
        masks = [torch.empty(work.frames, *work.frame_size, dtype=torch.bool) for _ in range(work.clips)]
    samples = [
        Sample(
            row=i, uid=str(i), clip=str(i), split="", class_name="", reference="", kind="", pixel_values=pixels[i],
            sam_pixels=sam[i], sam_size=(side, side), fbank=fbank[i], masks=masks[i], prompt_ids=nothing,
            answer_ids=nothing, teacher_ids=nothing, video_key=str(i), audio_key=str(i),
        )
        for i in range(work.clips)
    ]  # fmt: skip
    return Batch(samples, pixels, sam, fbank, masks)


def _packed(model: AuroraModel, rows: int, media: MediaFeatures, prompt: int, answer: int) -> PackedInputs:
    """Rows of equal length without values."""
    length = sum(x.shape[1] for x in (media.video, media.audio) if x is not None) + prompt + answer
    ids, index, labels = (_integers(rows, length) for _ in range(3))
    mask = torch.empty(rows, length, dtype=torch.bool, device="meta")
    return PackedInputs(ids, index, labels, mask, _integers(rows))


def _integers(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def _flags(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.bool, device="meta")


def _teacher_values(model: AuroraModel) -> int:
    """Values of a light checkpoint like this model's: what the teacher keeps beside the student."""
    names = trained_names(model)
    return sum(p.numel() for name, p in model.named_parameters() if name in names)
