"""Pure: what a step reports about the batch it was given, before and apart from any gradient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from async_rl.learner.batch import StepBatch


def batch_metrics(step: StepBatch, max_staleness: int) -> dict[str, float]:
    """Over the whole step, all ranks together.

    lag_* is over trainable tokens that keep their weight, lag_all_* over all of them, head_lag_* over rollouts (the
    oldest trainable token of each). compared_with_* is the number of others in the group of each rollout that its
    reward is relative to. masked_fraction is the share of trainable tokens past `max_staleness`.
    """
    lag_R, tokens_R = step.version - step.span_version_R, step.span_tokens_R
    kept_R = np.where(lag_R <= max_staleness, tokens_R, 0)
    head_lag_N = np.full(step.num_rollouts, -1, np.int64)
    np.maximum.at(head_lag_N, step.span_rollout_R, lag_R)
    fully_masked_N = np.bincount(step.span_rollout_R, kept_R, step.num_rollouts) == 0
    head_lag = head_lag_N[head_lag_N >= 0]
    trainable = max(step.trainable_tokens, 1)
    tokens_N = np.bincount(step.span_rollout_R, tokens_R, step.num_rollouts)
    others_N = step.baseline.others_N()
    return {
        **_lags("lag", lag_R, kept_R),
        **_lags("lag_all", lag_R, tokens_R),
        "head_lag_mean": float(head_lag.mean()) if len(head_lag) else 0.0,
        "head_lag_max": float(head_lag.max(initial=0)),
        "masked_fraction": 1.0 - float(kept_R.sum()) / trainable if step.trainable_tokens else 0.0,
        "fully_masked_rollouts": float(fully_masked_N.sum()),
        **_rewards(step),
        "compared_with_mean": float(others_N.mean()) if len(others_N) else 0.0,
        "compared_with_min": float(others_N.min(initial=step.num_rollouts)) if len(others_N) else 0.0,
        "samples": float(step.num_rollouts),
        "tokens": float(step.trainable_tokens),
        "tokens_read": float(step.sequences.fed_S.sum()),
        "completion_length_mean": float(tokens_N.mean()) if len(tokens_N) else 0.0,
        "sequence_length_mean": float(step.sequences.length_S.mean()) if len(step.sequences.length_S) else 0.0,
        "sequence_length_max": float(step.sequences.length_S.max(initial=0)),
    }


def _rewards(step: StepBatch) -> dict[str, float]:
    rewards = step.rewards_N[~np.isnan(step.rewards_N)].astype(np.float64)
    return {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "reward_std": float(rewards.std()) if len(rewards) else 0.0,
        "rewards_missing": float(step.num_rollouts - len(rewards)),
    }


def _lags(name: str, lag_R: npt.NDArray[np.int64], weight_R: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean, 95th percentile and maximum of a lag of which each value counts `weight_R` times."""
    total = int(weight_R.sum())
    if total == 0:
        return {f"{name}_mean": 0.0, f"{name}_p95": 0.0, f"{name}_max": 0.0}
    order = np.argsort(lag_R)
    reached = np.cumsum(weight_R[order])
    p95 = lag_R[order][np.searchsorted(reached, 0.95 * total)]
    return {
        f"{name}_mean": float((lag_R * weight_R).sum() / total),
        f"{name}_p95": float(p95),
        f"{name}_max": float(lag_R[weight_R > 0].max()),
    }
