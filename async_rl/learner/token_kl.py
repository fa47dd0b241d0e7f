"""KL between two models at chosen positions over the whole vocabulary, never holding [tokens, vocabulary] of it.

    reverse  KL(student || teacher)    gradient of logits  p_s ((log p_s - log p_t) - KL)
    forward  KL(teacher || student)    gradient of logits  p_s - p_t

Both heads are applied in chunks of rows, and again in the backward pass, which returns gradients of the student alone.
Softmax and sums are fp32, whatever the dtype of the matrix products. `algorithms.distillation` is the same on logits.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.learner.logprobs import chunk_of

Direction = Literal["reverse", "forward"]


def token_kl(
    student_KH: Tensor,
    student_VH: Tensor,
    teacher_KD: Tensor,
    teacher_VD: Tensor,
    *,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    chunk_elements: int | None = None,
) -> Tensor:
    """[K] float32 from hidden states and head weights.

    Where the heads have unequal numbers of rows (families of models pad them differently), both distributions are over
    the rows that both have.
    """
    vocabulary = min(student_VH.shape[0], teacher_VD.shape[0])
    rows = max(1, (chunk_elements or chunk_of(student_KH.device)) // (2 * vocabulary))
    arguments = (student_KH, student_VH, teacher_KD.detach(), teacher_VD.detach(), direction, temperature, rows)
    return cast(Tensor, _TokenKL.apply(*arguments))


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.to(hidden.dtype).t()).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        student_KH: Tensor,
        student_VH: Tensor,
        teacher_KD: Tensor,
        teacher_VD: Tensor,
        direction: Direction,
        temperature: float,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(student_KH, student_VH, teacher_KD, teacher_VD)
        ctx.direction, ctx.temperature, ctx.rows = direction, temperature, rows
        ctx.vocabulary = vocabulary = min(student_VH.shape[0], teacher_VD.shape[0])
        found = [student_KH.new_zeros(0, dtype=torch.float32)]
        with torch.autocast(student_KH.device.type, enabled=False):
            for student, teacher in zip(student_KH.split(rows), teacher_KD.split(rows), strict=True):
                log_s = _log_softmax(student, student_VH[:vocabulary], temperature)
                log_t = _log_softmax(teacher, teacher_VD[:vocabulary], temperature)
                log_p, log_q = (log_s, log_t) if direction == "reverse" else (log_t, log_s)
                found.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        student_KH, student_VH, teacher_KD, teacher_VD = ctx.saved_tensors
        (grad_K,) = grads
        grad_hidden = torch.zeros_like(student_KH)
        grad_weight = torch.zeros_like(student_VH, dtype=torch.float32)  # chunks add up, whatever the head's dtype
        weight = student_VH[: ctx.vocabulary]
        with torch.autocast(student_KH.device.type, enabled=False):
            for start in range(0, len(student_KH), ctx.rows):
                rows = slice(start, start + ctx.rows)
                log_s = _log_softmax(student_KH[rows], weight, ctx.temperature)
                log_t = _log_softmax(teacher_KD[rows], teacher_VD[: ctx.vocabulary], ctx.temperature)
                p = log_s.exp()
                if ctx.direction == "reverse":
                    difference = log_s - log_t
                    grad = p * (difference - torch.linalg.vecdot(p, difference)[:, None])
                else:
                    grad = p - log_t.exp()
                grad = (grad * (grad_K[rows, None] / ctx.temperature)).to(student_KH.dtype)
                grad_hidden[rows] = grad @ weight.to(grad.dtype)
                grad_weight[: ctx.vocabulary] += grad.t() @ student_KH[rows]
        return grad_hidden, grad_weight.to(student_VH.dtype), None, None, None, None, None
