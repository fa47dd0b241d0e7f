"""How far the proximal (trainer) log-probs are from the behaviour (engine) log-probs of the same tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from async_rl.algorithms.ratios import log_ratio


class Mismatch(NamedTuple):
    """Means over the active tokens; w = exp(proximal - behaviour)."""

    k1: Tensor
    """mean(behaviour - proximal), the KL(behaviour || proximal) estimate."""
    k3: Tensor
    """mean(w - 1 - log w), the same KL, always >= 0."""
    log_ppl_proximal: Tensor
    log_ppl_behaviour: Tensor
    abs_difference: Tensor
    max_ratio: Tensor
    chi2: Tensor
    """mean(w^2) - 1."""


def mismatch(proximal_T: Tensor, behaviour_T: Tensor, mask_T: Tensor) -> Mismatch:
    log_w_T = log_ratio(proximal_T, behaviour_T, mask_T)[mask_T]
    return Mismatch(
        k1=-log_w_T.mean(),
        k3=(log_w_T.expm1() - log_w_T).mean(),
        log_ppl_proximal=-proximal_T[mask_T].mean(),
        log_ppl_behaviour=-behaviour_T[mask_T].mean(),
        abs_difference=log_w_T.abs().mean(),
        max_ratio=log_w_T.max().exp(),
        chi2=(2 * log_w_T).exp().mean() - 1.0,
    )
