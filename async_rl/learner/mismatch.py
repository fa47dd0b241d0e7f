"""How far the learner's log-probs are from the engine's, by lag: as sums over micro-batches and ranks, and as metrics.

At lag 0 both have the same weights and must agree. At higher lags the policy has moved on, which adds to the
difference. Only tokens that no older keys and values led to count: what an engine computes from a mixed cache belongs
to no version.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.learner.batch import PackedMicroBatch
from async_rl.learner.optimisation import Stats

SUMS = ("tokens", "abs", "k3")
"""Tokens; |log w|, nats; w - 1 - log w, with w = p_learner / p_engine (ALGORITHMS.md 2.6)."""
HIGHEST = "mismatch_lag_0_max"
MAX_LAGS = 32
"""Tokens that are older still count nowhere."""


@torch.no_grad()
def mismatch_sums(logp_K: Tensor, microbatch: PackedMicroBatch, version: int, lags: int) -> Stats:
    """Sums for each lag in [0, lags), lag = version - version of the token, and the largest |log w| at lag 0."""
    counted_K = microbatch.unmixed_K
    log_w_K = log_ratio(logp_K, microbatch.behaviour_K, counted_K).double()
    lag_L1 = torch.arange(lags, device=logp_K.device)[:, None]
    of_lag_LK = counted_K & (version - microbatch.version_K == lag_L1)
    terms = (torch.ones_like(log_w_K), log_w_K.abs(), log_w_K.expm1() - log_w_K)
    stats: Stats = {}
    for name, term_K in zip(SUMS, terms, strict=True):
        sums_L = term_K.where(of_lag_LK, 0.0).sum(-1)
        stats |= {f"mismatch_lag_{lag}_{name}": total for lag, total in enumerate(sums_L.unbind())}
    equal_K = log_w_K.abs().where(of_lag_LK[0], 0.0)
    stats[HIGHEST] = equal_K.max() if len(equal_K) else equal_K.sum()
    return stats


def mismatch_metrics(values: dict[str, float], lags: int, former: Mapping[str, float]) -> dict[str, float]:
    """Takes its own sums out of `values`. Where there is no token, there is no mean.

    former: the same sums for one lag, of tokens under the weights that sampled them (learner.former_weights): they
    count as of equal version, and at no lag.

    mismatch_lag_{lag}_tokens, _abs, _k3: means over the tokens of that lag. equal_version_tokens, _gap (of |log w|),
    _gap_max, _k3: over tokens that engine and learner computed with the same weights.
    """
    highest = max(values.pop(HIGHEST, 0.0), former.get(HIGHEST, 0.0))
    metrics: dict[str, float] = {}
    equal = [former.get(f"mismatch_lag_0_{name}", 0.0) for name in SUMS]
    for lag in range(lags):
        tokens, gap, k3 = sums = [values.pop(f"mismatch_lag_{lag}_{name}", 0.0) for name in SUMS]
        if lag == 0:
            equal = [mine + other for mine, other in zip(sums, equal, strict=True)]
        if tokens:
            metrics |= {
                f"mismatch_lag_{lag}_tokens": tokens,
                f"mismatch_lag_{lag}_abs": gap / tokens,
                f"mismatch_lag_{lag}_k3": k3 / tokens,
            }
    tokens, gap, k3 = equal
    metrics["equal_version_tokens"] = tokens
    if tokens:
        metrics |= {
            "equal_version_gap": gap / tokens,
            "equal_version_gap_max": highest,
            "equal_version_k3": k3 / tokens,
        }
    return metrics
