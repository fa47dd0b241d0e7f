"""KL to a reference policy from sampled tokens, d = logp - reference (Schulman, "Approximating KL divergence", 2020).

    k1 = d      k2 = d^2 / 2      k3 = exp(-d) - 1 + d, bounded at 10 for the stability of a loss

On samples of the current policy E[k1] = E[k3] = KL, but as losses: E[grad k1] = 0, E[grad k2] = grad KL, and
**E[grad k3] is not grad KL**: k3 is unbiased as a value only, which the notes leave out. E[grad (pi / sg pi) k3] = grad
KL (DeepSeek-V3.2, 2512.02556). With samples of another policy every estimator needs the weight pi / mu: hence the
product default multiplies k3 by the ratio, gradient included, times the guarded weight (`ratio_weighted`). GRPO's Eq. 4
has it unweighted. Per token, not per sequence as the notes write; the
lecture's own KL path cannot run (nn.Module has no clone) and names a vocabulary axis that is positions. Direction:
RLHF's KL(policy || reference); TRPO's is KL(old || new). Coefficients: 0.04 DeepSeekMath, 0.001 R1, 0 by default.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio

KLEstimator = Literal["k1", "k2", "k3"]
K3_BOUND = 10.0


def kl_estimate(logp_T: Tensor, reference_T: Tensor, kind: KLEstimator = "k3", bound: float | None = None) -> Tensor:
    """[T] estimate of KL(policy || reference) at each token, differentiable in `logp_T`."""
    difference_T = log_ratio(logp_T, reference_T)
    match kind:
        case "k1":
            return difference_T
        case "k2":
            return difference_T.square() / 2
        case "k3":
            # expm1 keeps the small values that exp(-d) - 1 + d would round away in fp32
            k3_T = (-difference_T).expm1() + difference_T
            return k3_T if bound is None else k3_T.clamp(max=bound)


def kl_slope(logp_T: Tensor, reference_T: Tensor, kind: KLEstimator = "k3", bound: float | None = None) -> Tensor:
    """[T] d estimate / d logp: 1, d, 1 - exp(-d); 0 where the bound holds."""
    difference_T = log_ratio(logp_T, reference_T)
    match kind:
        case "k1":
            return torch.ones_like(difference_T)
        case "k2":
            return difference_T
        case "k3":
            slope_T = -(-difference_T).expm1()
            return slope_T if bound is None else slope_T.where(difference_T - slope_T < bound, 0.0)
