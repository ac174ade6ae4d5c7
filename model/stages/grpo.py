"""Stage 3: group-relative policy optimisation with format, IoU and class rewards, and mask supervision.

| paper | released code | here | why |
|---|---|---|---|
| eq. 4: (R - mean) / std | the same, unbiased std + 1e-4 | the same; without std or leave-one-out by config | see `model.objectives.policy` |
| eq. 5: clipped ratio to the policy that sampled | ratio exp(x - x.detach()), no clipping (LISA_grpo.py:571-575) | eq. 5, eps and eps_high | the paper; matters from the second update on |
| eq. 5: log-probabilities of the answers | gathered at positions of the sequence without media (LISA_grpo.py:252-263) | at the answers' positions, checked against step-by-step decoding | the released gradient is that of other tokens |
| beta = 0 | beta .04 set and unused | 0: no reference exists; above: k3 against the stage's start | a second set of trained tensors, not a second model |
| eq. 8: + BCE + Dice | 2 BCE + 0.5 Dice of every answer, of those without [SEG] at an arbitrary position (LISA_grpo.py:499-505) | `grpo.mask_loss_on`; never without [SEG] | such an answer asks for no mask |
| - | rollouts with dropout, clips encoded once per answer | eval mode throughout, clips encoded once, prompt read once per group | the first ratio is exactly 1; `model.aurora.shared_prompt` |
| no learning rate, no warm-up (4.1) | 1e-5, warm-up 30 (train_ds.py:88, :342) | the same | a tenth of the rate of the stages with a cross entropy |
| - | top_p .9, and top_k and repetition penalty of generation_config.json (else 50 and 1), in sampling, not in scoring | the same: old and new are both scored without cut and penalty | a ratio of two cut distributions may be 0 / 0 |
| reflective answers hold two paths | max_new_tokens 150 (LISA_grpo.py:434) | 320 | paper 6.2's example as a path is 148 words, about 200 tokens; what is cut has no [SEG] and no reward of format |

The old log-probabilities are those of the first scoring pass after sampling: the weights have not moved yet, so that
pass IS the sampling policy, in the very numerics of the later passes. Nothing is computed twice, and the first ratio is
exactly 1 in every precision; those that sampling itself saw differ by rounding (`sampling_gap`).
"""  # noqa: E501 (a table)

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from configs.schema import RunConfig
from model.aurora.generation import generate
from model.aurora.inference import answer_mask
from model.aurora.model import AuroraModel
from model.aurora.sampling import Sampling
from model.aurora.swapped import SwappedWeights
from model.objectives.policy import (
    GroupAdvantages,
    clipped_surrogate,
    group_advantages,
    k3_divergence,
    policy_mean,
)
from model.objectives.rewards import Judged, Rewards, frame_iou, load_rewards, names_class, score
from model.stages.base import Stage, draw_frames, query_mask_losses
from utils import distributed
from utils.results import encode_masks
from utils.types import Batch, Generation, GroupInputs, GroupOutput, MediaFeatures, StepLoss

_log = logging.getLogger("aurora.grpo")


@dataclass
class Rollouts:
    """B clips with G judged answers each, R = B * G; answer a belongs to clip a // G."""

    batch: Batch
    media: MediaFeatures  # features made without gradient; those of frozen towers serve the loss too
    packed: GroupInputs
    answers: Generation
    judged: list[Judged]
    masks: Tensor  # [Q,T,4h,4w] low-resolution mask logits of the queries of `answers`
    rewards: Rewards
    advantages: GroupAdvantages
    trained: Tensor  # bool [R]: answers in the policy loss (all, or those not truncated)
    supervised: Tensor  # bool [R]: answers whose masks are trained
    frame_index: Tensor | None  # int64 [B,k] frames with a mask loss; None = all T
    reference: Tensor | None  # float32 [R,L] log-probabilities under the policy of the stage's start; None at beta 0
    old_log_probs: Tensor | None = None  # float32 [R,L]: kept by the first loss
    tokens_per_second: float | None = None
    """Tokens of the answers of all processes over the time since the answers before, training on those included; None
    for the first."""


class GrpoStage(Stage):
    """Sample, judge, and raise the probability of what was better than its group.

    The model is put into eval mode and stays there: dropout would make the first ratio differ from 1, and checkpointed
    layers are computed again in backward, after `loss` has returned.

    Raises:
        ConfigError: an unknown reward, or a reference policy under ZeRO-3.
    """

    def __init__(self, config: RunConfig, engine: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(config, engine, tokenizer)
        g, defaults = config.grpo, self.model.generation_defaults
        self.rewards = load_rewards(g.reward_weights, g.reward_module, g.class_scoring)
        self.reference = SwappedWeights(self.model) if g.beta > 0 else None
        top_k = defaults.top_k if g.top_k is None else g.top_k
        penalty = defaults.repetition_penalty if g.repetition_penalty is None else g.repetition_penalty
        self.sampling = Sampling(g.temperature, g.top_p, top_k, penalty)
        if distributed.is_main():
            _log.info("answers are drawn at %s", self.sampling)
        self.with_masks = g.mask_loss_on != "none"
        self.updates = g.updates_per_batch
        self._drawn_at: float | None = None

    def draw(self, batch: Batch) -> tuple[MediaFeatures, Generation]:
        """Features of the B clips, and G answers about each."""
        g = self.config.grpo
        media = self.model.encode(batch)
        everyone = distributed.all_true if self.config.engine.zero_stage == 3 else None
        settings = g.max_new_tokens, g.group_size, self.sampling, everyone
        return media, generate(self.model, batch, media, self.tokenizer, *settings)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Rollouts:
        """Draw G answers per clip, judge each by its words and by its masks."""
        g, model = self.config.grpo, self.model.eval()
        media, answers = self.draw(batch)
        rate = self._rate(sum(map(len, answers.token_ids)))
        # Judged before anything is trained: the masks that earn the IoU are those of the policy that drew.
        judged, masks = judge(model, batch, media, answers, g.group_size)
        rewards = score(judged, self.rewards, g.reward_weights)
        packed = model.pack_group(batch, answers.token_ids, g.group_size, g.temperature)
        reference = None
        if self.reference is not None:
            # Frozen towers have read the clips for both policies; trained ones differ between them.
            words = replace(media, image_embeddings=None) if self.reference.shares_towers else None
            reference = self.reference(_log_probs, batch, packed, words)
        return Rollouts(
            batch=batch,
            media=media,
            packed=packed,
            answers=answers,
            judged=judged,
            masks=masks,
            rewards=rewards,
            advantages=group_advantages(rewards.total.to(model.device), g.group_size, g.advantage, g.advantage_eps),
            # A truncated answer does not say how it would have ended; its reward still counts in the group's mean.
            trained=~(answers.truncated.to(model.device) & g.mask_truncated),
            supervised=supervised_answers(g.mask_loss_on, judged, rewards.total, g.group_size).to(model.device),
            # Drawn once, so that several updates on the same answers are steps on the same loss.
            frame_index=draw_frames(batch, self.config.model.decode_frames_per_step, model.device),
            reference=reference,
            tokens_per_second=rate,
        )

    def loss(self, prepared: Rollouts) -> StepLoss:
        """Clipped surrogate over the answers' tokens (eq. 5) and mask losses of the same answers (eq. 8)."""
        g, weights, model = self.config.grpo, self.config.loss, self.model.eval()
        packed = prepared.packed
        # Trained towers run again, with gradient; what frozen ones said of the clips is taken from `prepare`.
        media = model.encode(prepared.batch, masks=self.with_masks, reuse=prepared.media)
        output = self.engine(packed, media, prepared.frame_index)
        if prepared.old_log_probs is None:
            # The weights have not moved since sampling: this pass is the policy that drew, and the ratio exactly 1.
            prepared.old_log_probs = output.log_probs.detach()
        # Tokens of answers alone: neither prompt nor padding, and no answer that is left out.
        mask = packed.mask & prepared.trained[:, None]
        surrogate = clipped_surrogate(
            output.log_probs, prepared.old_log_probs, prepared.advantages.values, g.clip_eps, g.clip_eps_high
        )
        total = policy_mean(surrogate.loss, mask, g.normalisation)
        parts = {"policy_loss": total, "clip_fraction": share(surrogate.clipped, mask)}
        if prepared.reference is not None:
            parts["kl"] = policy_mean(k3_divergence(output.log_probs, prepared.reference), mask, g.normalisation)
            total = total + g.beta * parts["kl"]
        if self.with_masks:
            # Eq. 8 trains masks and words together, but only masks that a right answer asked for (grpo.mask_loss_on).
            chosen = prepared.supervised[packed.answer_of_query]
            clips = packed.answer_of_query[chosen] // g.group_size
            losses = query_mask_losses(
                model, output.mask_logits[chosen], clips, prepared.batch, prepared.frame_index, weights.mask_side
            )
            bce, dice = weights.bce * losses.bce, weights.dice * losses.dice
            parts |= {"mask_bce_loss": bce, "mask_dice_loss": dice, "mask_loss": bce + dice}
            total = total + bce + dice
        parts |= {"loss": total, **rollout_scalars(prepared, output)}
        if prepared.tokens_per_second is not None:
            parts["tokens_per_second"] = torch.tensor(prepared.tokens_per_second)
        # Only an uncut distribution can be compared: of cut words, sampling knows another probability than scoring.
        if self.sampling.is_plain and prepared.answers.log_probs is not None:
            seen = torch.cat(prepared.answers.log_probs)
            parts["sampling_gap"] = (prepared.old_log_probs[packed.mask] - seen).abs().mean()
        return StepLoss(total, {name: value.detach() for name, value in parts.items()})

    def records(self, prepared: Rollouts) -> list[dict[str, Any]]:
        """One record per drawn answer; masks as COCO RLE per frame at native size, none without [SEG]."""
        found, group = [], self.config.grpo.group_size
        advantages, supervised = prepared.advantages.values.tolist(), prepared.supervised.tolist()
        for number, answer in enumerate(prepared.judged):
            clip, place = divmod(number, group)
            sample, rles = answer.sample, []
            low = answer_mask(prepared.masks, prepared.answers.answer_of_query, number)
            if low is not None:
                logits = self.model.segmenter.upscale(low, sample.sam_size, prepared.batch.mask_sizes[clip])
                rles = encode_masks((logits > 0).cpu().numpy())
            rewards = {name: round(float(values[number]), 4) for name, values in prepared.rewards.parts.items()}
            found.append({
                "row": sample.row, "uid": sample.uid, "reference": sample.reference, "class_name": sample.class_name,
                "sample": place, "answer": answer.text, "has_seg": answer.has_seg, "tokens": answer.tokens,
                "truncated": answer.truncated, "rewards": rewards,
                "reward": round(float(prepared.rewards.total[number]), 4), "advantage": round(advantages[number], 4),
                "iou": round(answer.iou, 4), "mask_trained": supervised[number], "masks": rles,
            })  # fmt: skip
        return found

    def _rate(self, tokens: int) -> float | None:
        """See `Rollouts.tokens_per_second`; the last token was read from the device, so the clock is right on a GPU."""
        before, self._drawn_at = self._drawn_at, time.perf_counter()
        return None if before is None else tokens * distributed.world_size() / (self._drawn_at - before)


def _log_probs(model: AuroraModel, batch: Batch, packed: GroupInputs, words: MediaFeatures | None) -> Tensor:
    """float32 [R,L] under a model's weights; without `words` its own towers read the clips."""
    return model(packed, model.encode(batch, masks=False) if words is None else words).log_probs


def judge(
    model: AuroraModel, batch: Batch, media: MediaFeatures, answers: Generation, group: int
) -> tuple[list[Judged], Tensor]:
    """What the rewards may read of R answers, and the masks of their queries: [Q,T,4h,4w] low-resolution logits.

    Each clip's masks are decoded together; the IoU is that of the annotated frames.
    """
    prompts, answer_of_query = model.drawn_queries(answers, batch, media)
    judged, decoded = [], []
    for clip, sample in enumerate(batch.samples):
        own = answer_of_query // group == clip
        low = model.decode_masks(prompts[own], answer_of_query[own] // group, media.image_embeddings)
        decoded.append(low)
        frames = list(range(low.shape[1]) if sample.labelled is None else sample.labelled)
        masks = batch.masks[clip][frames].to(low.device)
        for answer in range(clip * group, (clip + 1) * group):
            iou, mask = 0.0, answer_mask(low[:, frames], answer_of_query[own], answer)
            if mask is not None:
                iou = frame_iou(model.segmenter.upscale(mask, sample.sam_size, batch.mask_sizes[clip]), masks)
            truncated, length = bool(answers.truncated[answer]), len(answers.token_ids[answer])
            judged.append(Judged(answers.texts[answer], sample, iou, mask is not None, truncated, length))
    return judged, torch.cat(decoded)


def supervised_answers(rule: str, judged: list[Judged], rewards: Tensor, group: int) -> Tensor:
    """bool [R], on the CPU: answers whose masks are trained (`grpo.mask_loss_on`); never one without [SEG].

        all            as eq. 8 reads and as released
        class_correct  those that name the right class: others would teach the decoder to contradict the words
        best           of each group the one with the highest reward, the first of several
        none           none
    """
    has_seg = torch.tensor([answer.has_seg for answer in judged])
    if rule == "class_correct":
        return has_seg & torch.tensor([names_class(answer.text, answer.sample.class_name) for answer in judged])
    if rule == "best":
        # Ties go to the first: two equal answers would otherwise weigh twice.
        ranked = rewards.masked_fill(~has_seg, -torch.inf).view(-1, group)
        first = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.argmax(1, keepdim=True), True)
        return has_seg & first.flatten()
    return has_seg & (rule == "all")


def rollout_scalars(prepared: Rollouts, output: GroupOutput) -> dict[str, Tensor]:
    """Rewards and the state of the groups, under the names of the paper's Figures 8 and 9."""
    answered, rewards, groups = prepared.packed.mask, prepared.rewards, prepared.advantages
    return {
        "reward_all": rewards.total.mean(),
        **{f"reward_{name}": values.mean() for name, values in rewards.parts.items()},
        "completion_length": answered.sum(1).float().mean(),
        "truncated_share": prepared.answers.truncated.float().mean(),
        "group_std": groups.std.mean(),
        "zero_variance_share": groups.zero_variance.float().mean(),
        "supervised_share": prepared.supervised.float().mean(),
        "entropy": output.entropy.sum() / answered.sum(),
    }


def share(flags: Tensor, mask: Tensor) -> Tensor:
    """Share of True among `flags` where `mask` holds, 0 if it holds nowhere."""
    return (flags & mask).sum() / mask.sum().clamp(min=1)
