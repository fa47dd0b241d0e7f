"""Effective sample size of importance weights (Kish): (sum w)^2 / sum w^2, and what follows from it.

ess_frac = ESS / N. Warn below 0.5, skip the step below 0.05 (ours); VCPO scales the learning rate by sqrt(ess_frac).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ess(weights_T: Tensor, mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scalars: ESS and ESS / N over the active tokens; 0 when every weight is 0."""
    mask_T = torch.ones_like(weights_T, dtype=torch.bool) if mask_T is None else mask_T
    weights_T = weights_T.where(mask_T, 0.0)
    size = weights_T.sum().square() / weights_T.square().sum().clamp(min=torch.finfo(weights_T.dtype).tiny)
    return size, size / mask_T.sum().clamp(min=1)


def sequence_ess(
    log_weights_T: Tensor, mask_T: Tensor, sequence_T: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """ESS over sequences, each weighing the product of its tokens' weights; in log space, so nothing overflows."""
    log_w_N = log_weights_T.new_zeros(num_sequences).index_add(0, sequence_T, log_weights_T.where(mask_T, 0.0))
    return ess((log_w_N - log_w_N.max()).exp())


def ess_lr_scale(ess_frac: Tensor, *, power: float = 0.5) -> Tensor:
    """Factor on the learning rate: ess_frac^power, 0.5 for Adam."""
    return ess_frac.clamp(0.0, 1.0) ** power
