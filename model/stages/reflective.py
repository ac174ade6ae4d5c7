"""Stage 2: corrective reflective-style training.

| paper | released code | here | why |
|---|---|---|---|
| eq. 7: CE + BCE + Dice, no distillation | the trainer of stage 1 with other data (train_ds.py:245-273) | the same, weights by config | the model has its segmentation from the teacher already |
| 6.3: "a similar structure to Stage 1", whose decoder is frozen (3.1) | decoder trained (train_ds.py:280) | `trainable.mask_decoder`: false in configs/reflective.yaml, true as released | the paper decides |
| eq. 3: y_wrong + trigger + y_correct replaces the target | a list of finished texts | `dataset.records` builds and reads them | the parts stay known by their spans |
| 3.2: "using the cross-entropy loss" on the path | all tokens | `reflective.loss_on`: all, or the correction alone | with `all` the model is also taught to write the mistake; both are trained on the same input |
| Table 4, CT: corrected paths alone | - | `reflective.target: corrected_only` | one config value |
| no learning rate, no warm-up (4.1) | see `model.stages.sft` | as stage 1: 1e-4, warm-up 100 | the same losses |
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from model.stages.base import Prepared, SupervisedStage
from utils.types import IGNORE, Batch, PackedInputs


class ReflectiveStage(SupervisedStage):
    """Cross entropy of reflective and standard answers from `Sample.label_start` on, and their mask losses (eq. 7)."""

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Lay the batch out and leave the tokens before each sample's `label_start` unlabelled."""
        prepared = super().prepare(batch)
        return replace(prepared, packed=ignore_before(prepared.packed, [s.label_start for s in batch.samples]))


def ignore_before(packed: PackedInputs, starts: Sequence[int]) -> PackedInputs:
    """The same batch with the first `starts[b]` answer tokens of row b unlabelled: read, but not learned.

    Raises:
        ValueError: a count is negative, or leaves a row with an answer no labelled token; names the row.
    """
    labelled = packed.labels != IGNORE
    if len(starts) != len(labelled):
        raise ValueError(f"ignore_before: {len(labelled)} rows, {len(starts)} starts; must be equal")
    for number, (start, length) in enumerate(zip(starts, labelled.sum(1).tolist(), strict=True)):
        if start and not 0 <= start < length:
            raise ValueError(f"ignore_before: row {number}: start {start}, but the answer has tokens 0..{length - 1}")
    first = torch.tensor(list(starts), device=labelled.device)[:, None]
    early = labelled & (labelled.cumsum(1) <= first)
    return replace(packed, labels=packed.labels.masked_fill(early, IGNORE))
