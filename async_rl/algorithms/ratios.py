"""Log-ratios of two policies, bounded before the exponential."""

from __future__ import annotations

from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""exp(20) = 4.9e8 still squares and sums within fp32 (verl uses the same bound)."""
_FLOOR = -1e30
"""Stands for -inf, so that -inf - (-inf) is 0 and not NaN."""


def log_ratio(numerator_T: Tensor, denominator_T: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """[T] numerator - denominator, clamped to +-20; 0 where both are -inf and where `mask_T` is False.

    Trap: masking by multiplication turns inf * 0 into NaN; it is filled with 0 before the exponential instead.
    A NaN of an unmasked token stays NaN: hiding it would hide the broken forward pass that made it.
    """
    difference_T = numerator_T.clamp(min=_FLOOR).sub_(denominator_T.clamp(min=_FLOOR))
    if mask_T is not None:
        difference_T = difference_T.masked_fill(~mask_T, 0.0)
    return difference_T.clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
