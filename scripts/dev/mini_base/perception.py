"""Pretraining of the mini base's eyes and ears: SigLIP + connector, BEATs + projector, SAM.

Each part learns dense tasks through heads that are thrown away: which class and colour stands in a patch, which class
sounds when and how loud, which pixels a concept names. All classes take part, unseen ones too: the base knows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from dataset.fbank import kaldi_fbank
from dataset.mini import scene as scenes
from model.backbones.videollama2.backbone import VideoLlama2
from model.segmenters.sam import SamSegmenter
from scripts.dev.mini_base.corpus import random_scene

CLASSES, COLOURS = scenes.CLASSES, tuple(scenes.COLOURS)


@dataclass
class Bank:
    """Rendered scenes in memory: frames uint8 [n,T,H,W,3], owner uint8 [n,T,H,W], fbank float16 [n,F,K]."""

    scenes: list[scenes.Scene]
    frames: Tensor
    owner: Tensor
    fbank: Tensor
    classes: Tensor
    """int64 [n,4]: class by owner value, len(CLASSES) for the background."""
    colours: Tensor
    """int64 [n,4], len(COLOURS) for the background."""
    sounds: list[tuple]
    """What is heard in each scene (empty = muted)."""


def make_bank(count: int, seed: int, mel_bins: int, workers: int) -> Bank:
    """Render `count` scenes of all classes, a twentieth of them muted."""
    rng = np.random.default_rng(seed)
    drawn = [random_scene(rng) for _ in range(count)]
    muted = [bool(rng.random() < 0.05) for _ in drawn]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(partial(_render, mel_bins), drawn, muted, chunksize=16))
    classes = torch.tensor([[len(CLASSES), *(CLASSES.index(t.class_name) for t in s.things)] for s in drawn])
    colours = torch.tensor([[len(COLOURS), *(COLOURS.index(t.colour) for t in s.things)] for s in drawn])
    frames, owner, fbank = (torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True))
    sounds = [() if m else s.sounds for s, m in zip(drawn, muted, strict=True)]
    return Bank(drawn, frames, owner, fbank, classes, colours, sounds)


def _render(mel_bins: int, scene: scenes.Scene, muted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    frames, owner = scenes.render_frames(scene)
    for t, frame in enumerate(frames):  # the clips on disk are JPEGs too
        code = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        frames[t] = cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1]
    wave = torch.from_numpy(scenes.render_audio(scene, muted))
    return frames, owner, kaldi_fbank(wave, mel_bins).numpy().astype(np.float16)


def vision_pixels(frames: Tensor) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [...,3,H,W] in [-1, 1] (SigLIP's normalisation)."""
    return (frames.movedim(-1, -3).float() / 255 - 0.5) / 0.5


def sam_pixels(frames: Tensor, segmenter: SamSegmenter) -> Tensor:
    """uint8 [...,H,W,3] -> float32 [...,3,H,W] in SAM's normalisation."""
    sam = segmenter.sam
    return (frames.movedim(-1, -3).float() - sam.pixel_mean) / sam.pixel_std


def schedule(steps: int, optimiser: torch.optim.Optimizer, warmup: int = 50, hold: float = 0.3) -> Iterator[float]:
    """Yield the share of steps done, `steps` times, setting each group's lr before (warm-up, hold, cosine)."""
    peaks = [group["lr"] for group in optimiser.param_groups]
    for step in range(1, steps + 1):
        share = step / steps
        decay = 1.0 if share < hold else 0.5 * (1 + math.cos(math.pi * (share - hold) / (1 - hold))) + 0.01
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1, step / warmup) * decay
        yield share


def _adamw(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters()]
    decayed, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))


def _step(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss.backward()
    for group in optimiser.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimiser.step()


def _owner_of_cells(owner: Tensor, cells: int) -> Tensor:
    """uint8 [...,T,H,W] -> int64 [...,T,cells,cells]: the thing that covers most of a cell, 0 below 8 %."""
    side = owner.shape[-1] // cells
    tiles = owner.unflatten(-1, (cells, side)).unflatten(-3, (cells, side))
    shares = torch.stack([(tiles == k).float().mean((-3, -1)) for k in (1, 2, 3)], -1)
    best, index = shares.max(-1)
    return torch.where(best > 0.08, index + 1, 0)


def _concept_loss(logits: Tensor, bank: Bank, scene: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of class and colour per cell; things weigh four times the background. Returns (loss, accuracy)."""
    flat = owner.flatten(1)
    kind, colour = bank.classes[scene].gather(1, flat), bank.colours[scene].gather(1, flat)
    by_class, by_colour = logits.split([len(CLASSES) + 1, len(COLOURS) + 1], -1)
    weight = 1 + 3 * (flat > 0).float()
    loss = sum(
        (functional.cross_entropy(part.flatten(0, 1), label.flatten(), reduction="none") * weight.flatten()).mean()
        for part, label in ((by_class, kind), (by_colour, colour))
    )
    right = ((by_class.argmax(-1) == kind) & (by_colour.argmax(-1) == colour))[flat > 0].float().mean()
    return loss, right


def pretrain_vision(model: VideoLlama2, bank: Bank, steps: int, report: Callable[[str], None]) -> None:
    """SigLIP and the connector name class, colour and place of what stands in each patch and each video token."""
    outputs = len(CLASSES) + len(COLOURS) + 2
    width, language = model.config.vision.hidden_size, model.config.language.hidden_size
    cells = model.config.vision.grid
    pooled = cells // 2
    patch_head, token_head = nn.Linear(width, outputs), nn.Linear(language, outputs)
    place_head = nn.Linear(language, pooled * pooled)
    parts = [model.vision_tower, model.mm_projector, patch_head, token_head, place_head]
    optimiser = _adamw(parts, 1.5e-3)
    places = torch.arange(pooled * pooled).repeat(scenes.FRAMES // 2)
    log: list[tuple[float, ...]] = []
    for step, share in enumerate(schedule(steps, optimiser), 1):
        scene = torch.randint(len(bank.scenes), (8,))
        pixels = vision_pixels(bank.frames[scene])
        with torch.autocast("cpu", torch.bfloat16):
            patches = model.vision_tower(pixels.flatten(0, 1))
            tokens = model.mm_projector(patches.unflatten(0, pixels.shape[:2]))
            on_patches, on_tokens, on_places = patch_head(patches), token_head(tokens), place_head(tokens)
        owner = bank.owner[scene]
        near, right = _concept_loss(on_patches.float().unflatten(0, (8, -1)).flatten(1, 2), bank, scene,
                                    _owner_of_cells(owner, cells))  # fmt: skip
        pairs = owner.unflatten(1, (-1, 2))
        halves = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], -1)  # the two frames of a token side by side
        both = _owner_of_cells(halves[..., : scenes.FRAME_SIDE], pooled)
        later = _owner_of_cells(halves[..., scenes.FRAME_SIDE :], pooled)
        far, kept = _concept_loss(on_tokens.float(), bank, scene, torch.where(both > 0, both, later))
        where = functional.cross_entropy(on_places.float().flatten(0, 1), places.repeat(len(scene)))
        _step(near + far + 0.3 * where, optimiser)
        log.append((near.item(), right.item(), far.item(), kept.item(), where.item()))
        if step % 100 == 0:
            means = np.mean(log[-100:], 0)
            report(f"vision {step} {share:.0%} patch {means[0]:.3f} acc {means[1]:.3f} | token {means[2]:.3f} "
                   f"acc {means[3]:.3f} | place {means[4]:.3f}")  # fmt: skip


def pretrain_audio(model: VideoLlama2, bank: Bank, steps: int, report: Callable[[str], None]) -> None:
    """BEATs and its projector tell which class sounds in each patch and how loud."""
    count = len(CLASSES)
    head = nn.Linear(model.config.language.hidden_size, 2 * count)
    optimiser = _adamw([model.audio_tower, model.mm_projector_a, head], 1.5e-3)
    frames = bank.fbank.shape[1]
    patch = model.config.beats.input_patch_size
    level = _sound_levels(bank, frames // patch, patch)
    log: list[tuple[float, float, float]] = []
    for step, share in enumerate(schedule(steps, optimiser), 1):
        scene = torch.randint(len(bank.scenes), (24,))
        tokens = model.encode_audio(bank.fbank[scene].float())
        per_time = tokens.unflatten(1, (frames // patch, -1)).mean(2)
        active, loud = head(per_time).split(count, -1)
        target = level[scene]
        on = (target > 0).float()
        detect = functional.binary_cross_entropy_with_logits(active, on)
        gauge = (((loud - torch.log(target.clamp(min=1e-3)) - 2) ** 2) * on).sum() / on.sum().clamp(min=1)
        _step(5 * detect + 0.3 * gauge, optimiser)
        exact = ((active > 0).any(1) == (on > 0).any(1)).all(1).float().mean()
        log.append((detect.item(), gauge.item(), exact.item()))
        if step % 200 == 0:
            means = np.mean(log[-200:], 0)
            report(f"audio {step} {share:.0%} detect {means[0]:.4f} loudness {means[1]:.3f} clip-exact {means[2]:.3f}")


def _sound_levels(bank: Bank, steps: int, patch: int) -> Tensor:
    """float32 [n, steps, classes]: amplitude while a class sounds, else 0 (a patch lasts 10 ms * `patch`)."""
    levels = torch.zeros(len(bank.scenes), steps, len(CLASSES))
    for i, (scene, heard) in enumerate(zip(bank.scenes, bank.sounds, strict=True)):
        for thing in scene.things if heard else ():
            if thing.amplitude > 0:
                first = math.ceil(thing.onset * 100 / patch)
                levels[i, first:, CLASSES.index(thing.class_name)] = thing.amplitude
    return levels


def pretrain_sam(segmenter: SamSegmenter, bank: Bank, steps: int, report: Callable[[str], None]) -> None:
    """SAM segments what stands at a point or at a named place, whatever its class, as the released one does.

    Its embedding also tells class and colour of each cell through a head that is thrown away: without it the encoder
    finds things by their edges alone, and nothing could ever prompt it by what they are.
    """
    width = segmenter.prompt_width
    places = nn.Embedding(4, width)
    nn.init.normal_(places.weight, std=0.5)
    sam = segmenter.sam
    head = nn.Linear(width, len(CLASSES) + len(COLOURS) + 2)
    optimiser = _adamw([sam.image_encoder, sam.mask_decoder, sam.prompt_encoder, places, head], 1.2e-3)
    grid = segmenter.image_size // segmenter.sizes.patch_size
    log: list[tuple[float, float, dict[str, float]]] = []
    for step, share in enumerate(schedule(steps, optimiser), 1):
        scene = torch.randint(len(bank.scenes), (16,))
        frame = torch.randint(scenes.FRAMES, (16,))
        owner = bank.owner[scene, frame]
        wanted = torch.randint(1, 4, (16,))
        kind = list(_PROMPTS)[int(torch.multinomial(torch.tensor(list(_PROMPTS.values())), 1))]
        if kind == "point":
            prompts, target = _point_prompt(segmenter, owner, wanted)
        else:
            prompts, target = _place_prompt(places, wanted, owner, "noise" in kind)
        embedding = sam.image_encoder(sam_pixels(bank.frames[scene, frame], segmenter))
        cells, right = _concept_loss(head(embedding.flatten(2).mT), bank, scene, _owner_of_cells(owner, grid))
        low = segmenter.decode(embedding[:, None], prompts)[:, 0]
        logits = functional.interpolate(low[:, None], owner.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        bce = functional.binary_cross_entropy_with_logits(logits, target)
        p, g = logits.sigmoid().flatten(1), target.flatten(1)
        dice = (1 - (2 * (p * g).sum(1) + 1) / (p.sum(1) + g.sum(1) + 1)).mean()
        _step(4 * bce + dice + 0.5 * cells, optimiser)
        union = ((logits > 0) | (target > 0)).flatten(1).sum(1)
        iou = (((logits > 0) & (target > 0)).flatten(1).sum(1) / union.clamp(min=1))[union > 0].mean()
        log.append((dice.item(), right.item(), {kind: iou.item()}))
        if step % 200 == 0:
            recent = log[-200:]
            by_kind = {name: np.mean([x[name] for *_, x in recent if name in x]) for name in _PROMPTS}
            listed = ", ".join(f"{name} {value:.3f}" for name, value in by_kind.items())
            dice_mean, right_mean = np.mean([x[:2] for x in recent], 0)
            report(f"sam {step} {share:.0%} dice {dice_mean:.3f} cells {right_mean:.3f} IoU {listed}")


_PROMPTS = {"place": 0.2, "place with noise": 0.6, "point": 0.2}
"""What prompts tell, and how often."""


def _place_prompt(places: nn.Embedding, wanted: Tensor, owner: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """A prompt naming the place of the wanted thing, and its mask."""
    prompts = places(wanted)
    if noisy:  # what SAM does not know must not drown what it knows, and a faint word is heard like a loud one
        loudness = torch.empty(len(wanted), 1).uniform_(-1.5, 1.5).exp()
        prompts = loudness * (prompts + torch.rand(len(wanted), 1) * torch.randn_like(prompts))
    return prompts, (owner == wanted[:, None, None]).float()


def _point_prompt(segmenter: SamSegmenter, owner: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    target = (owner == wanted[:, None, None]).float()
    weight = target.flatten(1) + 1e-9
    index = torch.multinomial(weight, 1)[:, 0]
    points = torch.stack([index % owner.shape[-1], index // owner.shape[-1]], -1).float()[:, None]
    encoder = segmenter.sam.prompt_encoder
    # As the encoder embeds a point of the foreground (at a pixel's centre), without the empty point that it would add.
    prompts = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    return prompts[:, 0] + encoder.point_embeddings[1].weight, target
