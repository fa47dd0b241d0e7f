"""KL from hidden states, in chunks, against the same on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from async_rl.algorithms.distillation import distill_kl
from async_rl.learner.token_kl import Direction, token_kl


def inputs(student_rows: int = 11, teacher_rows: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64).float()

    student, teacher = normal(7, 5), normal(7, 6)
    return student.requires_grad_(), normal(student_rows, 5).requires_grad_(), teacher, normal(teacher_rows, 6)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_elements", [1, 44, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_are_the_whole(direction: Direction, chunk_elements: int, temperature: float) -> None:
    student, head, teacher, teacher_head = inputs()
    weight_K = torch.linspace(0.5, 1.5, 7)
    kl_K = token_kl(student, head, teacher, teacher_head, direction=direction, temperature=temperature,
                    chunk_elements=chunk_elements)  # fmt: skip
    (kl_K * weight_K).sum().backward()
    found = kl_K.detach(), student.grad, head.grad
    student.grad = head.grad = None
    logits, others = student @ head.t() / temperature, teacher @ teacher_head.t() / temperature
    whole_K = distill_kl(logits, others, direction=direction)
    (whole_K * weight_K).sum().backward()
    for one, other in zip(found, (whole_K.detach(), student.grad, head.grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert (kl_K > 0).all()


@pytest.mark.parametrize("rows", [(11, 13), (13, 11)])
def test_heads_padded_to_unequal_sizes(rows: tuple[int, int]) -> None:
    """Both distributions are over the rows that both have; rows beyond get no gradient."""
    student, head, teacher, teacher_head = inputs(*rows)
    kl_K = token_kl(student, head, teacher, teacher_head)
    torch.testing.assert_close(kl_K, distill_kl(student @ head[:11].t(), teacher @ teacher_head[:11].t()))
    kl_K.sum().backward()
    assert head.grad is not None and (head.grad[11:] == 0).all() and (head.grad[:11] != 0).any()


def test_equal_models_are_zero_apart_and_nothing_is_nothing() -> None:
    student, head, _, _ = inputs()
    torch.testing.assert_close(token_kl(student, head, student, head), torch.zeros(7), atol=1e-6, rtol=0)
    assert token_kl(student[:0], head, student[:0], head).shape == (0,)
