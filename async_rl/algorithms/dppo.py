"""DPPO's mask: a trust region on probabilities instead of ratios (Qi et al. 2026, arXiv:2602.04879).

    drop token if (A > 0 and p - p_mu > high) or (A < 0 and p - p_mu < -low),   low = high = 0.2

A ratio band is needlessly tight for rare tokens (1e-5 -> 3e-5 is a ratio of 3) and loose for likely ones.
"""

from __future__ import annotations

from torch import Tensor


def dppo_mask(
    logp_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, active_T: Tensor, *, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """[T] bool, True = the token is dropped."""
    shift_T = logp_T.exp() - behaviour_T.exp()
    outward_T = ((advantages_T > 0) & (shift_T > high)) | ((advantages_T < 0) & (shift_T < -low))
    return active_T & outward_T
