"""Sampled answers with their rewards and masks as records for samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.objectives.rewards import Judged, Rewards
from utils.results import encode_masks
from utils.types import Batch


@dataclass(frozen=True)
class Samples:
    """R = B * G judged answers; answer a belongs to clip a // G."""

    batch: Batch
    judged: Sequence[Judged]
    rewards: Rewards
    advantages: Tensor
    """float32 [R]"""
    supervised: Tensor
    """bool [R]: whether the answer's masks are trained."""
    masks: Sequence[Tensor]
    """B x [G,T,4h,4w] low-resolution mask logits."""

    def records(self, upscale: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]) -> list[dict[str, Any]]:
        """One record per answer; masks as COCO RLE per frame at native size, none without [SEG].

        Args:
            upscale: `Segmenter.upscale`.
        """
        group = len(self.judged) // len(self.batch)
        found = []
        for number, answer in enumerate(self.judged):
            clip, place = divmod(number, group)
            sample, rles = answer.sample, []
            if answer.has_seg:
                logits = upscale(
                    self.masks[clip][place], self.batch.sam_sizes[clip], tuple(self.batch.masks[clip].shape[-2:])
                )
                rles = encode_masks((logits > 0).cpu().numpy())
            rewards = {name: round(float(values[number]), 4) for name, values in self.rewards.parts.items()}
            found.append({
                "row": sample.row, "uid": sample.uid, "reference": sample.reference, "class_name": sample.class_name,
                "sample": place, "answer": answer.text, "has_seg": answer.has_seg, "tokens": answer.tokens,
                "truncated": answer.truncated, "rewards": rewards,
                "reward": round(float(self.rewards.total[number]), 4),
                "advantage": round(float(self.advantages[number]), 4), "iou": round(answer.iou, 4),
                "mask_trained": bool(self.supervised[number]), "masks": rles,
            })  # fmt: skip
        return found
