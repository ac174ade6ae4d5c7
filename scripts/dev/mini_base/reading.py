"""Pretraining of the mini base's language: recall and reading first, then questions about real clips.

A small model does not bind the words of a question by itself: text exercises (associative recall, comprehension of
captions) come first, from attention heads initialised to look at the previous token and at a short window. Then the
whole backbone learns captions and questions about clips, packed as a tree behind one media prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from dataset.mini.language import KINDS
from model.backbones.videollama2.backbone import VideoLlama2
from scripts.dev.mini_base.corpus import Branch, place_drill, random_scene, recall_exercise, tree
from scripts.dev.mini_base.perception import Bank, _adamw, _step, schedule, vision_pixels
from scripts.dev.mini_base.tokens import PackedTree, TreePacker
from utils.types import IGNORE

LEXICON = (
    " red green blue yellow purple white drum guitar flute dog cat clock car piano tuba sheep left middle right first "
    "last loud quiet louder quieter silent sound object making make target"
).split()
FILLERS = ", what is the object ? where of on a colour".split()


@torch.no_grad()
def initialise_heads(model: nn.Module, seed: int = 0) -> None:
    """Start layer 0 with one group of heads on the previous token and one on a window of about six tokens.

    All query and key maps start aligned (a head first looks for equal content), all value and output maps nearly
    inverse; the two positional groups work through the q/k biases, which rotary embedding turns into a preference
    for a distance.
    """
    config = model.config
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    generator = torch.Generator().manual_seed(seed)
    theta = model.config.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(0, size, 2) / size)

    def orthogonal() -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        basis = orthogonal()
        for group in range(groups):
            rows = slice(group * size, (group + 1) * size)
            of_group = range(group * heads // groups, (group + 1) * heads // groups)
            noise = 0.02 * torch.randn(size, width, generator=generator)
            attention.k_proj.weight[rows] = 0.7 * basis[rows] + noise
            values = orthogonal()[:size]
            attention.v_proj.weight[rows] = 0.5 * values
            for head in of_group:
                columns = slice(head * size, (head + 1) * size)
                noise = 0.02 * torch.randn(size, width, generator=generator)
                attention.q_proj.weight[columns] = 0.7 * basis[rows] + noise
                attention.o_proj.weight[:, columns] = 0.5 * values.T
        attention.q_proj.bias.zero_()
        attention.k_proj.bias.zero_()
        if index == 0:
            _prefer_distance(attention, 0, 1.0, 4.0 * (frequency > 0.03).float(), heads // groups, size, frequency)
            window = 2.2 * ((frequency > 0.03) & (frequency < 0.6)).float()
            _prefer_distance(attention, 1, 3.0, window, heads // groups, size, frequency)


def _prefer_distance(attention: nn.Module, group: int, distance: float, strength: Tensor, heads: int, size: int,
                     frequency: Tensor) -> None:  # fmt: skip
    """Bias the heads of a key group so that their scores peak `distance` tokens back."""
    angle = frequency * distance
    query = torch.cat([strength, torch.zeros(size // 2)])
    key = torch.cat([strength * torch.cos(angle), strength * torch.sin(angle)])
    rows = slice(group * size, (group + 1) * size)
    attention.k_proj.bias[rows] = key
    attention.k_proj.weight[rows] *= 0.05
    for head in range(group * heads, (group + 1) * heads):
        columns = slice(head * size, (head + 1) * size)
        attention.q_proj.bias[columns] = query
        attention.q_proj.weight[columns] *= 0.05


class TextTasks:
    """Batches of text exercises and their loss."""

    def __init__(self, packer: TreePacker, seed: int) -> None:
        self.packer = packer
        self.rng = np.random.default_rng(seed)
        vocabulary = packer.tokenizer.get_vocab()
        known = [vocabulary.get("Ġ" + word) for word in LEXICON]
        self.words = [i for i in known if i is not None]
        found = [vocabulary.get(word, vocabulary.get("Ġ" + word)) for word in FILLERS]
        self.fillers = [i for i in found if i is not None]

    def recall(self, language: nn.Module, count: int) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) of `count` recall exercises."""
        drawn = [recall_exercise(self.words, self.fillers, self.rng) for _ in range(count)]
        size = max(len(ids) for ids, _ in drawn)
        ids = torch.zeros(count, size, dtype=torch.long)
        labels = torch.full((count, size), IGNORE)
        for i, (a, b) in enumerate(drawn):
            ids[i, : len(a)], labels[i, : len(b)] = torch.tensor(a), torch.tensor(b)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = language.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != IGNORE
            logits = language.lm_head(hidden[wanted]).float()
        target = labels[:, 1:][wanted]
        return functional.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()

    def comprehension(
        self, language: nn.Module, count: int, after: int = 10, look_ups: int = 0
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, accuracy by group) of captions of unseen clips followed by questions."""
        trees = [tree(random_scene(self.rng), self.rng, 0, after, 4, look_ups=look_ups) for _ in range(count)]
        return self._reading(language, trees)

    def drill(self, language: nn.Module, count: int) -> tuple[Tensor, dict[str, float]]:
        """(loss, accuracy by group) of captions followed by where their things stand."""
        return self._reading(language, [place_drill(random_scene(self.rng), self.rng) for _ in range(count)])

    def _reading(self, language: nn.Module, trees: list[list[Branch]]) -> tuple[Tensor, dict[str, float]]:
        packed = self.packer(trees, with_media=False)
        return tree_loss(language, packed, language.model.embed_tokens(packed.ids), {"caption": 0.1, "then": 0.5})


def tree_loss(
    language: nn.Module, packed: PackedTree, embeddings: Tensor, weights: dict[str, float]
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum over groups of the mean cross entropy, and token accuracy by group (weight 1 unless given)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = language.model(inputs_embeds=embeddings, attention_mask=packed.allowed,
                                position_ids=packed.positions, use_cache=False).last_hidden_state  # fmt: skip
        wanted = packed.labels != IGNORE
        logits = language.lm_head(hidden[wanted]).float()
    target, group = packed.labels[wanted], packed.groups[wanted]
    loss = functional.cross_entropy(logits, target, reduction="none")
    right = (logits.argmax(-1) == target).float()
    total, accuracy = logits.new_zeros(()), {}
    families = {name: name.split("-")[0] for name in packed.names}
    for family in sorted(set(families.values())):
        members = torch.tensor([i for i, name in enumerate(packed.names) if families[name] == family])
        chosen = torch.isin(group, members)
        if chosen.any():
            total = total + weights.get(family, 1.0) * loss[chosen].mean()
    for i, name in enumerate(packed.names):
        if (group == i).any():
            accuracy[name] = right[group == i].mean().item()
    return total, accuracy


def pretrain_text(model: VideoLlama2, packer: TreePacker, steps: int, report: Callable[[str], None]) -> None:
    """Recall and reading comprehension on text alone."""
    language = model.language_model
    initialise_heads(language)
    tasks = TextTasks(packer, 3)
    optimiser = _adamw([language], 2e-3)
    log: list[tuple[float, float, float]] = []
    for step, share in enumerate(schedule(steps, optimiser, warmup=100), 1):
        recall, right = tasks.recall(language, 24)
        reading, accuracy = tasks.comprehension(language, 6)
        _step(recall + reading, optimiser)
        answers = [v for k, v in accuracy.items() if k != "caption"]
        log.append((recall.item(), right.item(), float(np.mean(answers))))
        if step % 100 == 0:
            means = np.mean(log[-100:], 0)
            report(f"text {step} {share:.0%} recall {means[0]:.3f} acc {means[1]:.3f} reading acc {means[2]:.3f}")


def pretrain_places(model: VideoLlama2, packer: TreePacker, steps: int, report: Callable[[str], None]) -> None:
    """One look-up alone, on text: where the thing of a name stands.

    Among other exercises a small model answers "in the middle" by look-up and takes one of left and right for both, for
    thousands of steps. Alone and in one wording the look-up is found in some hundred steps; it is trained until nearly
    every word is right, at most `steps`. Other wordings follow when all is trained again.
    """
    language = model.language_model
    tasks = TextTasks(packer, 9)
    optimiser = _adamw([language], 2e-3)
    log: list[tuple[float, float]] = []
    for step, share in enumerate(schedule(steps, optimiser, hold=0.95), 1):
        recall, _ = tasks.recall(language, 2)
        loss, accuracy = tasks.drill(language, 8)
        _step(loss + 0.1 * recall, optimiser)
        log.append((loss.item(), accuracy["look"]))
        if step % 50 == 0:
            mean, right = np.mean(log[-50:], 0)
            report(f"places {step} {share:.0%} loss {mean:.3f} acc {right:.3f}")
            if right > 0.985:
                return


def pretrain_joint(
    model: VideoLlama2, packer: TreePacker, bank: Bank, held_out: int, steps: int, report: Callable[[str], None],
    look_ups: int = 0,
) -> None:  # fmt: skip
    """Captions and questions about clips; the vision tower and BEATs are frozen, the projectors learn along.

    Args:
        held_out: scenes at the end of the bank, not trained on.
        look_ups: questions about single entities behind each caption, in place of as many about references.
    """
    language = model.language_model
    patches, heard = _tower_features(model, bank)
    tasks = TextTasks(packer, 4 + look_ups)
    rng = np.random.default_rng(5 + look_ups)
    optimiser = _adamw([language, model.mm_projector, model.mm_projector_a], 1.5e-3)
    train = len(bank.scenes) - held_out
    log: list[tuple[float, dict[str, float]]] = []
    for step, share in enumerate(schedule(steps, optimiser, warmup=100), 1):
        index = rng.integers(train, size=8)
        loss, accuracy = _clip_loss(model, packer, bank, patches, heard, index, rng, look_ups // 2)
        recall, _ = tasks.recall(language, 6)
        reading, _ = tasks.comprehension(language, 8, 10 - look_ups // 2, look_ups)
        _step(loss + 0.3 * recall + reading, optimiser)
        log.append((loss.item(), accuracy))
        if step % 50 == 0:
            recent = log[-50:]
            mean = np.mean([value for value, _ in recent])
            report(f"joint {step} {share:.0%} loss {mean:.3f} {_table([accuracies for _, accuracies in recent])}")
        if step % 500 == 0:
            report(f"joint {step} held-out {evaluate(model, packer, bank, patches, heard, train)}")
    report(f"joint held-out {evaluate(model, packer, bank, patches, heard, train)}")


def _clip_loss(model: VideoLlama2, packer: TreePacker, bank: Bank, patches: Tensor, heard: Tensor, index: np.ndarray,
               rng: np.random.Generator, look_ups: int = 0) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    trees = [tree(bank.scenes[i], rng, 8, 5, 2, None if bank.sounds[i] else (), look_ups) for i in index]
    packed = packer(trees)
    embeddings = _embedded(model, packed, patches[index], heard[index])
    return tree_loss(model.language_model, packed, embeddings, {"direct": 1.0, "ask": 0.5, "state": 0.5, "then": 1.0})


def _embedded(model: VideoLlama2, packed: PackedTree, patches: Tensor, heard: Tensor) -> Tensor:
    """float32 [B,S,D]: words, and the projected clips where the media stand."""
    with torch.autocast("cpu", torch.bfloat16):
        media = torch.cat([model.mm_projector(patches.float()), model.mm_projector_a(heard.float())], 1)
    words = model.language_model.model.embed_tokens(packed.ids)
    return words.masked_scatter(packed.media[..., None], media.float())


@torch.no_grad()
def evaluate(model: VideoLlama2, packer: TreePacker, bank: Bank, patches: Tensor, heard: Tensor, first: int) -> str:
    """Share of answers about the held-out scenes that are right in every word, by group.

    Words alone say little: of "the cat sounds first, so on the right: the blue cat" all but one may follow by habit.
    """
    rng = np.random.default_rng(77)
    found: dict[str, list[bool]] = {}
    for i in range(first, len(bank.scenes), 20):
        index = np.arange(i, min(i + 20, len(bank.scenes)))
        trees = [tree(bank.scenes[i], rng, 8, 0, 4, None if bank.sounds[i] else ()) for i in index]
        packed = packer(trees)
        logits = model.language_model(
            inputs_embeds=_embedded(model, packed, patches[index], heard[index]), attention_mask=packed.allowed,
            position_ids=packed.positions, use_cache=False,
        ).logits  # fmt: skip
        for name, right in whole_answers(packed, logits.argmax(-1) == packed.labels):
            found.setdefault(name, []).append(right)
    order = ("direct", *(f"then-{kind}" for kind in KINDS), "then-repeat")
    return " ".join(f"{name} {np.mean(found[name]):.3f}" for name in order if name in found)


def whole_answers(packed: PackedTree, right: Tensor) -> list[tuple[str, bool]]:
    """(group, whether all its tokens are right) of every answer; `right` bool [B,S]."""
    answers = []
    for groups, tokens in zip(packed.groups, right, strict=True):
        values, counts = torch.unique_consecutive(groups, return_counts=True)
        for group, part in zip(values.tolist(), tokens.split(counts.tolist()), strict=True):
            if group >= 0:
                answers.append((packed.names[group], bool(part.all())))
    return answers


def _table(rows: list[dict[str, float]]) -> str:
    order = ("caption", "direct", "look", *(f"{how}-{kind}" for how in ("ask", "state", "then") for kind in KINDS),
             "then-repeat")  # fmt: skip
    shares = {name: [row[name] for row in rows if name in row] for name in order}
    return " ".join(f"{name} {np.mean(values):.3f}" for name, values in shares.items() if values)


@torch.no_grad()
def _tower_features(model: VideoLlama2, bank: Bank) -> tuple[Tensor, Tensor]:
    """float16 patches [n,T,N,Dv] and BEATs tokens [n,Ma,Da] of the whole bank."""
    patches, heard = [], []
    for i in range(0, len(bank.scenes), 25):
        pixels = vision_pixels(bank.frames[i : i + 25])
        patches.append(model.vision_tower(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).half())
        heard.append(model.audio_tower(bank.fbank[i : i + 25].float()).half())
    return torch.cat(patches), torch.cat(heard)
