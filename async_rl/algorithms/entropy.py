"""Entropy of the policy and the controller that holds it in a band.

    H_t = -sum_v p log p     of the logits at the training temperature;   the loss gets -entropy_coef H

Controller: coef += step if H < target else -= step, kept in [low, high] (ours; Qwen 3 reports steady entropy, not the
rule). Trap: -p log p is 0 * -inf for a forbidden token: it must count 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits_BV: Tensor) -> Tensor:
    """[B] entropy over the last axis, differentiable."""
    logp_BV = torch.log_softmax(logits_BV, -1)
    return -(logp_BV.exp() * logp_BV.masked_fill(torch.isneginf(logp_BV), 0.0)).sum(-1)


def entropy_controller(
    coef: float, entropy_mean: float, *, target: float, step: float = 1e-4, low: float = 0.0, high: float = 0.05
) -> float:
    """The coefficient for the next step."""
    return min(max(coef + (step if entropy_mean < target else -step), low), high)
