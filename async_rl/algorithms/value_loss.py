"""The critic's clipped loss (PPO reference implementation; verl).

    0.5 mean max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2),   c = 0.2

The factor 0.5 is inside; the usual coefficient in the total is 0.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ValueLoss(NamedTuple):
    loss: Tensor
    """Scalar: this micro-batch's part; divide by the trainable tokens of the step."""
    clip_fraction: Tensor
    """Share of the step's tokens whose clipped branch was strictly larger."""


def value_loss(
    values_T: Tensor,
    old_values_T: Tensor,
    returns_T: Tensor,
    mask_T: Tensor,
    *,
    clip: float = 0.2,
    num_tokens: float | None = None,
) -> ValueLoss:
    """`num_tokens`: trainable tokens of the whole step; None = this batch is the whole step."""
    values_T, old_values_T = values_T.where(mask_T, 0.0), old_values_T.where(mask_T, 0.0)
    returns_T = returns_T.where(mask_T, 0.0)
    bounded_T = torch.clamp(values_T, old_values_T - clip, old_values_T + clip)
    free_T, clipped_T = (values_T - returns_T).square(), (bounded_T - returns_T).square()
    count = mask_T.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)
    loss = 0.5 * torch.maximum(free_T, clipped_T).where(mask_T, 0.0).sum() / count
    return ValueLoss(loss, ((clipped_T > free_T) & mask_T).sum() / count)
