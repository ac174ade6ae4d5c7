"""The segmentation-only teacher (before stage 1).

| paper | released code | here | why |
|---|---|---|---|
| 3.1: a specialist trained on segmentation alone, "using only simple prompts (It is [SEG])" | reads "It is {class} [SEG]." (LISA_ref_distill.py; data code commented out) | `data.answer`: class or plain | with the plain answer the teacher has to find the object by itself; both are the authors' |
| 3.1 names no loss | CE + 2 BCE + 0.5 Dice (train_ds.py:89-91) | CE + BCE + Dice, weights by config | the decoder is trained by the mask losses, [SEG] is learned by CE |
| 3.1: SAM's decoder is trained here and frozen later | trained (train_ds.py:280) | `trainable.mask_decoder` | - |
| "more extensive training steps" | - | `optim.steps` | no number is given |
| - | batch 1; every -100 token dropped, padding included (LISA_ref_distill.py:204-206) | any batch | [SEG] positions come from the layout |
| no learning rate, no warm-up (4.1) | see `model.stages.sft` | as stage 1: 1e-4, warm-up 100 | the same losses |
"""  # noqa: E501 (a table)

from __future__ import annotations

from model.stages.base import SupervisedStage


class TeacherStage(SupervisedStage):
    """Cross entropy, BCE and Dice on "It is {class} [SEG]." or "It is [SEG]."."""
