"""REINFORCE whose weight carries no gradient: loss = -sg[weight] A logp, gradient -weight A on every token.

    reinforce   weight = 1 (Williams 1992; on policy, or with a guarded proximal/behaviour weight outside)
    cispo       weight = clip(r, 1 - clip_low, 1 + clip_high)   (MiniMax-M1, arXiv:2506.13585, Eq. 4-5)
    aipo        weight = min(r, rho), rho in [2, 10]            (LlamaRL, 2505.24034)

r = pi / behaviour. Defaults: clip_low = 1 (no floor), clip_high tuned (ScaleRL and TRL: max 5), rho = 2.
Trap: the weight must be a constant. Written as -min(r, rho) A, truncated tokens would get no gradient at all.
"""

from __future__ import annotations

from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.surrogate import Surrogate


def reinforce(logp_T: Tensor, advantages_T: Tensor) -> Surrogate:
    """[T] -A logp. With A = reward it is reward-weighted SFT; a reward in {0, 1} then updates on correct samples
    only.
    """
    return Surrogate(-advantages_T * logp_T, -advantages_T)


def cispo_weight(logp_T: Tensor, behaviour_T: Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0) -> Tensor:
    """[T] the ratio in its band, without gradient."""
    return log_ratio(logp_T, behaviour_T).exp().clamp(1.0 - clip_low, 1.0 + clip_high)


def cispo(
    logp_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> Surrogate:
    weight_T = cispo_weight(logp_T, behaviour_T, clip_low=clip_low, clip_high=clip_high)
    high_T = weight_T >= 1.0 + clip_high  # at a bound means clipped to it
    low_T = weight_T <= 1.0 - clip_low if clip_low < 1.0 else None
    slope_T = -weight_T * advantages_T
    return Surrogate(slope_T * logp_T, slope_T, low_T, high_T)


def aipo_weight(logp_T: Tensor, behaviour_T: Tensor, *, rho: float = 2.0) -> Tensor:
    """[T] the ratio truncated from above, without gradient."""
    return log_ratio(logp_T, behaviour_T).exp().clamp(max=rho)


def aipo(logp_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor, *, rho: float = 2.0) -> Surrogate:
    weight_T = aipo_weight(logp_T, behaviour_T, rho=rho)
    slope_T = -weight_T * advantages_T
    return Surrogate(slope_T * logp_T, slope_T, None, weight_T >= rho)
