"""Distillation KL on logits (Qwen 3 strong-to-weak, arXiv:2505.09388, Sec. 4.5; GKD, 2306.13649).

    reverse = KL(student || teacher) (default)        forward = KL(teacher || student)

Stage one is cross-entropy on the teacher's samples in both thinking modes; stage two this KL on the student's own
samples. The report does not say which direction; reverse is our choice: it is the one that needs student samples.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from async_rl.algorithms.exact_kl import exact_kl


def distill_kl(
    student_BV: Tensor, teacher_BV: Tensor, *, direction: Literal["reverse", "forward"] = "reverse"
) -> Tensor:
    """[B] KL per token over the full vocabulary, with gradient for the student only."""
    teacher_BV = teacher_BV.detach()
    return exact_kl(student_BV, teacher_BV) if direction == "reverse" else exact_kl(teacher_BV, student_BV)
