"""Baselines: any b that does not depend on the action leaves the expected gradient unchanged, since sum_a b grad pi =
0.

    optimal      b* = E[|grad log pi|^2 R] / E[|grad log pi|^2]
    off-policy   b = sum w^2 g^2 R / sum w^2 g^2    (VCPO)
    moving       b <- b + alpha (mean R - b)

The notes and the lecture write grad pi in the optimal baseline; it is grad LOG pi. None, group, leave-one-out, batch:
group_advantage.py; a critic: gae.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def offpolicy_baseline(weights_N: Tensor, grad_norm2_N: Tensor, rewards_N: Tensor) -> Tensor:
    """The constant of least variance under importance weights; weights of 1 give the on-policy optimum b*."""
    importance_N = weights_N.square() * grad_norm2_N
    return (importance_N * rewards_N).sum() / importance_N.sum()


def moving_baseline(baseline: float, rewards_N: Tensor, *, alpha: float = 0.1) -> float:
    """Exponential moving average of the mean reward; missing rewards (NaN) do not move it."""
    mean = rewards_N.nanmean()
    return baseline if bool(mean.isnan()) else baseline + alpha * (float(mean) - baseline)


class BernoulliBaseline(NamedTuple):
    optimal: Tensor
    mean: Tensor
    variance_none: Tensor
    variance_mean: Tensor
    variance_optimal: Tensor
    gradient: Tensor
    """d E[R] / d w, the same for every baseline."""


def bernoulli_baseline(p: float | Tensor, rewards_2: Tensor) -> BernoulliBaseline:
    """Baselines of the two-armed policy pi(0) = p = sigmoid(w), rewards of arm 0 and arm 1, one parameter w."""
    pi_2 = torch.stack([torch.as_tensor(p, dtype=rewards_2.dtype), 1 - torch.as_tensor(p, dtype=rewards_2.dtype)])
    score_2 = torch.stack([pi_2[1], -pi_2[0]])  # d log pi / d w
    optimal = offpolicy_baseline(pi_2.sqrt(), score_2.square(), rewards_2)
    mean = pi_2 @ rewards_2
    gradient = pi_2 @ (score_2 * rewards_2)

    def variance(b: Tensor | float) -> Tensor:
        sample_2 = score_2 * (rewards_2 - b)
        return pi_2 @ sample_2.square() - (pi_2 @ sample_2).square()

    return BernoulliBaseline(optimal, mean, variance(0.0), variance(mean), variance(optimal), gradient)
