"""TOPR: tapered off-policy REINFORCE (Le Roux et al. 2025, arXiv:2503.14286).

    loss = -mean_i sg[alpha_i] R_i log pi(y_i),   alpha = 1 where R >= 0, else clip(pi(y) / mu(y), 0, 1)

Good answers pull at full weight however old they are; bad ones push only while the policy still gives them mass.
R is the raw reward (the preset has no baseline), in {-1, 1} in the paper. Aggregate with `seq_mean_token_sum`.
Trap: with rewards in {0, 1} there is no negative sample and TOPR becomes rejection-sampling fine-tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.segments import segment_sum
from async_rl.algorithms.surrogate import Surrogate


def topr_alpha(logp_T: Tensor, behaviour_T: Tensor, rewards_N: Tensor, active_T: Tensor, sequence_T: Tensor) -> Tensor:
    """[N] the taper, without gradient."""
    log_r_N = segment_sum(log_ratio(logp_T, behaviour_T, active_T), sequence_T, rewards_N.shape[0])
    return torch.where(rewards_N >= 0, 1.0, log_r_N.clamp(max=0.0).exp())


def topr(
    logp_T: Tensor,
    behaviour_T: Tensor,
    rewards_N: Tensor,
    active_T: Tensor,
    sequence_T: Tensor,
) -> Surrogate:
    alpha_N = topr_alpha(logp_T, behaviour_T, rewards_N, active_T, sequence_T)
    slope_T = -(alpha_N * rewards_N)[sequence_T]
    return Surrogate(slope_T * logp_T, slope_T)
