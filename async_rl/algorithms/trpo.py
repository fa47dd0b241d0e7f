"""TRPO's step for one softmax (Schulman et al. 2015, arXiv:1502.05477, Eq. 14 and App. C): exact Fisher, toy scale.

    max E[u A]  s.t.  KL(old || new) <= delta;   step = sqrt(2 delta / g^T F^-1 g) F^-1 g

F^-1 g by conjugate gradients, then halve until KL <= delta and the gain is positive. F is singular along (1, ..., 1),
which g is orthogonal to, so CG gives the pseudo-inverse solution; networks add `damping` = 1e-3. delta = 0.01.
The constraint's direction is KL(old || new), RLHF's penalty is KL(policy || reference): the notes write both alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from async_rl.algorithms.exact_kl import exact_kl

BACKTRACKS = 30
"""Halvings before the step is given up."""


class TRPOStep(NamedTuple):
    gradient_V: Tensor
    fisher_VV: Tensor
    step_V: Tensor
    kl_old_new: Tensor
    surrogate_gain: Tensor


def trpo_step(
    logits_V: Tensor, advantages_V: Tensor, *, delta: float = 0.01, damping: float = 0.0, iterations: int = 10
) -> TRPOStep:
    """The step on the logits, its KL and the gain of the surrogate E_old[u A]; a zero step where nothing improves."""
    policy_V = torch.softmax(logits_V, -1)
    expected = policy_V @ advantages_V
    zero = torch.zeros_like(expected)
    gradient_V = policy_V * (advantages_V - expected)
    fisher_VV = torch.diag(policy_V) - torch.outer(policy_V, policy_V)
    damped_VV = fisher_VV + damping * torch.eye(len(policy_V), dtype=policy_V.dtype)
    direction_V = conjugate_gradient(damped_VV, gradient_V, iterations=iterations)
    curvature = gradient_V @ direction_V
    step_V = (2 * delta / curvature).sqrt() * direction_V if curvature > 0 else torch.zeros_like(gradient_V)
    for _ in range(BACKTRACKS):
        kl = exact_kl(logits_V, logits_V + step_V)
        gain = torch.softmax(logits_V + step_V, -1) @ advantages_V - expected
        if kl <= delta and gain > 0:
            return TRPOStep(gradient_V, fisher_VV, step_V, kl, gain)
        step_V = step_V / 2
    return TRPOStep(gradient_V, fisher_VV, torch.zeros_like(step_V), zero, zero)


def conjugate_gradient(
    matrix_VV: Tensor, vector_V: Tensor, *, iterations: int = 10, tolerance: float = 1e-20
) -> Tensor:
    """[V] solution of matrix x = vector for a symmetric positive semi-definite matrix with vector in its range."""
    solution_V, residual_V = torch.zeros_like(vector_V), vector_V.clone()
    direction_V, size = residual_V, residual_V @ residual_V
    for _ in range(iterations):
        if size <= tolerance:
            break
        product_V = matrix_VV @ direction_V
        length = size / (direction_V @ product_V)
        solution_V, residual_V = solution_V + length * direction_V, residual_V - length * product_V
        previous, size = size, residual_V @ residual_V
        direction_V = residual_V + size / previous * direction_V
    return solution_V
