"""Segmentation feature distillation: the student's [SEG] feature follows the teacher's (paper section 3.1, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_distillation(teacher: Tensor, student: Tensor, teacher_has_seg: Tensor, student_has_seg: Tensor) -> Tensor:
    """MSE(f_t, f_s), mean over the width and over the answers that have a [SEG] in both (paper eq. 2).

    Args:
        teacher: [B,C] projected hidden states at the teacher's [SEG]; its gradient is cut.
        student: [B,C] likewise, differentiable.
        teacher_has_seg, student_has_seg: bool [B].

    Returns:
        float32 scalar; zero without gradient where no answer has both.

    Raises:
        ValueError: the two features differ in shape.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher features {tuple(teacher.shape)} against student features {tuple(student.shape)}: "
            "both must be built for the same SAM (prompt width) and the same batch"
        )
    both = teacher_has_seg & student_has_seg
    if not bool(both.any()):
        return torch.zeros((), device=student.device)
    return F.mse_loss(student[both].float(), teacher[both].detach().float())
