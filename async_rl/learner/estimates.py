"""Pure: what the losses of a step compare with: rewards less KL, relative to a group or to a critic.

    group      A_i  = formula of the preset over the rewards of the group, R_i - beta sum_t (behaviour - reference)_t
    critic     r_t  = -beta (behaviour - reference)_t + 1[t = last] R;   A, returns = GAE(r, V), A whitened
    V-trace    the same of V-trace(r, V, current / behaviour), whose rho joins A where the loss has no ratio of its own

beta is the coefficient of the step (learner.kl_coefficient) where the preset has its KL in the reward, else 0.
Everything is of the whole step, which every rank holds, so nothing depends on micro-batches or ranks. Axis suffixes:
learner.batch, and
    M  trained tokens of the step, in order
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from async_rl.algorithms.gae import gae
from async_rl.algorithms.objective import Objective
from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.reward_shaping import kl_shaped_rewards
from async_rl.algorithms.vtrace import vtrace
from async_rl.algorithms.whitening import masked_whiten
from async_rl.config import Critic
from async_rl.learner.baselines import BaselineRows
from async_rl.learner.batch import StepBatch


class CriticEstimates(NamedTuple):
    """[A] float32 each, 0 where a token has no weight."""

    advantages_A: Tensor
    values_A: Tensor
    """Of the critic before the step."""
    returns_A: Tensor
    """What they should have been."""
    active_A: Tensor
    """[A] bool: trained on, not too old, of a rollout with a reward."""
    rho_A: Tensor | None
    """V-trace's truncated current / behaviour; None: the estimate is GAE."""


def group_advantages(objective: Objective, rows: BaselineRows, penalty_N: Tensor | None = None) -> Tensor:
    """[N] of the rollouts of the step, each relative to its baseline.

    penalty_N: subtracted from the rewards. Who is of another step has none: the mean of its group in this one is taken.
    """
    rewards_B, group_B = torch.from_numpy(rows.rewards_B), torch.from_numpy(rows.group_B)
    row_N = torch.from_numpy(rows.row_N)
    if penalty_N is not None:
        groups = int(group_B.max()) + 1 if len(group_B) else 0
        group_N = group_B[row_N]
        total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_N, penalty_N.double())
        penalty_B = (total / torch.bincount(group_N, minlength=groups))[group_B]
        penalty_B[row_N] = penalty_N.double()
        rewards_B = rewards_B - penalty_B.float()
    return objective.advantages(rewards_B, group_B, torch.from_numpy(rows.in_step_B))[row_N]


def rollout_kl(step: StepBatch, reference_A: Tensor) -> Tensor:
    """[N] the k1 of the sampling policy in nats, summed over the trained tokens of each rollout."""
    token_M, rollout_M = trained_tokens(step)
    kl_M = torch.from_numpy(step.behaviour_A[token_M]) - reference_A[token_M]
    return torch.zeros(step.num_rollouts).index_add_(0, rollout_M, kl_M)


def critic_estimates(
    objective: Objective,
    critic: Critic,
    step: StepBatch,
    values_A: Tensor,
    reference_A: Tensor | None,
    current_A: Tensor | None = None,
    *,
    kl_coef: float,
    bound: int,
) -> CriticEstimates:
    """GAE, or V-trace where the objective says so, over the trained tokens of each rollout, in order over all its
    sequences; observations are stepped over.

    current_A: log-probs of the policy before the step, for V-trace. kl_coef: beta. bound: tokens that are more versions
    old have values and rewards, and no advantage.
    """
    token_M, rollout_M = trained_tokens(step)
    behaviour_M, values_M = torch.from_numpy(step.behaviour_A[token_M]), values_A[token_M]
    in_reward = reference_A is not None and objective.kl_in == "reward"
    reference_M = reference_A[token_M] if in_reward and reference_A is not None else behaviour_M
    score_N = torch.from_numpy(step.rewards_N).clamp(-objective.reward_clip, objective.reward_clip)
    every_M = torch.ones_like(token_M, dtype=torch.bool)
    shaped = kl_shaped_rewards(behaviour_M, reference_M, score_N, every_M, rollout_M, beta=kl_coef)
    decay, rho_M = {"gamma": critic.gamma, "lam": critic.lam}, None
    if objective.advantage == "vtrace":
        assert current_A is not None
        ratios_M = log_ratio(current_A[token_M], behaviour_M).exp_()
        bounds = {"rho_bar": objective.rho_bar, "c_bar": objective.c_bar}
        traced = vtrace(shaped.rewards_T, values_M, ratios_M, every_M, rollout_M, **decay, **bounds)
        returns_M, advantages_M, rho_M = traced
    else:
        advantages_M, returns_M = gae(shaped.rewards_T, values_M, every_M, rollout_M, **decay)
    fresh_M = step.version - torch.from_numpy(step.version_A[token_M]) <= bound
    active_M = fresh_M & ~score_N.isnan()[rollout_M]
    if critic.whiten:
        advantages_M = masked_whiten(advantages_M, active_M)
    if rho_M is not None and not objective.has_ratio:
        advantages_M = advantages_M * rho_M

    def spread(x_M: Tensor) -> Tensor:
        x_A = torch.zeros(len(step.version_A), dtype=x_M.dtype)
        x_A[token_M] = x_M if x_M.dtype == torch.bool else x_M.where(active_M, 0.0)
        return x_A

    rho_A = None if rho_M is None else spread(rho_M)
    return CriticEstimates(spread(advantages_M), spread(values_M), spread(returns_M), spread(active_M), rho_A)


def trained_tokens(step: StepBatch) -> tuple[Tensor, Tensor]:
    """[M] places in A, ascending, and [M] their rollouts."""
    token_M = np.flatnonzero(step.version_A >= 0)
    sequence_M = np.searchsorted(step.sequences.start_S, token_M, side="right") - 1
    rollout_M = np.searchsorted(step.first_N, sequence_M, side="right") - 1
    return torch.from_numpy(token_M), torch.from_numpy(rollout_M)


def explained_variance(estimates: CriticEstimates) -> float:
    """1 - Var(return - value) / Var(return) over the tokens with weight: 1 = the critic knows, 0 = only the mean."""
    values_M, returns_M = (x_A[estimates.active_A] for x_A in (estimates.values_A, estimates.returns_A))
    variance = float(returns_M.var(unbiased=False)) if len(returns_M) else 0.0
    return 1.0 - float((returns_M - values_M).var(unbiased=False)) / variance if variance else 0.0
