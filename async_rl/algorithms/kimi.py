"""Kimi k1.5: policy mirror descent on whole answers (Kimi Team 2025, arXiv:2501.12599, Eq. 2-3).

S = sum of the log-probs of an answer, S_i the same under the policy at the start of the iteration (the proximal
policy).

    mirror descent (Eq. 3)   loss = -mean[(r - mean r) S - (tau / 2) (S - S_i)^2]
    squared surrogate (Eq. 2) loss = mean (r - tau log Z - tau (S - S_i))^2,   tau log Z = tau log mean exp(r / tau)
    optimum                   pi* = pi_i exp(r / tau) / Z

Eq. 3 is -1/(2 tau) times the gradient of Eq. 2 with tau log Z replaced by the mean reward, right for tau -> inf; at tau
= 0.1 tau log Z is close to max r. The notes do not say that the scale changes: both losses are here, each exactly as
written. No clip, no std, no critic; the paper resets the optimizer each iteration because the reference changes. k >= 2
answers. tau is unpublished (0.1 is ours). S grows with the length: to tame it divide by a CONSTANT (aggregation
`seq_mean_token_sum_norm`), never by |o_i|, which would bring back the length bias.
Eq. 2 holds for answers of any origin, so behaviour != proximal is admissible; a guard is optional.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from async_rl.algorithms.group_advantage import group_extreme, group_spread
from async_rl.algorithms.segments import segment_sum
from async_rl.algorithms.surrogate import Surrogate


class SequenceLoss(NamedTuple):
    loss_N: Tensor
    slope_N: Tensor
    """d loss / d S, which is the derivative for each token's log-prob."""


def kimi_mirror_descent(
    seq_logp_N: Tensor, seq_proximal_N: Tensor, advantages_N: Tensor, *, tau: float = 0.1
) -> SequenceLoss:
    """[N] Eq. 3 with advantages r - mean r."""
    shift_N = seq_logp_N - seq_proximal_N
    loss_N = -(advantages_N * seq_logp_N - tau / 2 * shift_N.square())
    return SequenceLoss(loss_N, tau * shift_N - advantages_N)


def kimi_squared(seq_logp_N: Tensor, seq_proximal_N: Tensor, advantages_N: Tensor, *, tau: float = 0.1) -> SequenceLoss:
    """[N] Eq. 2 with advantages r - tau log Z."""
    residual_N = advantages_N - tau * (seq_logp_N - seq_proximal_N)
    return SequenceLoss(residual_N.square(), -2 * tau * residual_N)


def group_tau_log_z(rewards_N: Tensor, group_N: Tensor, *, tau: float = 0.1) -> Tensor:
    """[N] tau log mean exp(r / tau) over the answers of each rollout's group; missing rewards (NaN) are left out."""
    group_N = torch.unique(group_N, return_inverse=True)[1]
    valid_N, num_groups = ~rewards_N.isnan(), len(group_N)
    best_N = group_extreme(rewards_N, valid_N, group_N, num_groups, "amax")
    mass_N = ((rewards_N - best_N) / tau).exp().where(valid_N, 0.0)
    mean_N = segment_sum(mass_N, group_N, num_groups) / segment_sum(valid_N.to(mass_N.dtype), group_N, num_groups)
    return best_N + tau * mean_N.log().index_select(0, group_N)


def kimi_advantage(rewards_N: Tensor, group_N: Tensor, *, tau: float = 0.1) -> Tensor:
    """[N] r - tau log Z; 0 where the reward is missing, exactly 0 where all rewards of the group are equal."""
    group_N = torch.unique(group_N, return_inverse=True)[1]
    valid_N = ~rewards_N.isnan()
    reward_N = rewards_N.double()
    informative_N = group_spread(reward_N, valid_N, group_N, len(group_N)) > 0
    advantage_N = reward_N - group_tau_log_z(reward_N, group_N, tau=tau)
    return advantage_N.where(valid_N & informative_N, 0.0).to(rewards_N.dtype)


def kimi_closed_form(policy_V: Tensor, rewards_V: Tensor, *, tau: float) -> tuple[Tensor, Tensor]:
    """pi* [V] and Z: the policy that the loss moves towards, for an enumerated answer space."""
    tilted_V = policy_V * (rewards_V / tau).exp()
    return tilted_V / tilted_V.sum(), tilted_V.sum()


def kimi_tokens(
    kind: str,
    logp_T: Tensor,
    proximal_T: Tensor,
    advantages_T: Tensor,
    active_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    *,
    tau: float,
) -> Surrogate:
    """[T] each sequence's loss in equal shares on its active tokens, for the aggregations that sum over tokens."""
    one_T = active_T.to(logp_T.dtype)
    length_N = segment_sum(one_T, sequence_T, num_sequences).clamp(min=1.0)
    advantages_N = segment_sum(advantages_T * one_T, sequence_T, num_sequences) / length_N
    seq_N = segment_sum(logp_T.where(active_T, 0.0), sequence_T, num_sequences)
    proximal_N = segment_sum(proximal_T.where(active_T, 0.0), sequence_T, num_sequences)
    loss = kimi_mirror_descent if kind == "kimi" else kimi_squared
    loss_N, slope_N = loss(seq_N, proximal_N, advantages_N, tau=tau)
    return Surrogate((loss_N / length_N)[sequence_T], slope_N[sequence_T])
