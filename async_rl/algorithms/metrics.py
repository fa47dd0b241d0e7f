"""Statistics of a loss as sums that can be added over micro-batches and ranks, and the metrics they turn into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from async_rl.algorithms.batch import CleanBatch
from async_rl.algorithms.guards import Guarded
from async_rl.algorithms.kl import kl_estimate
from async_rl.algorithms.ratios import LOG_RATIO_BOUND
from async_rl.algorithms.segments import segment_any, segment_sum
from async_rl.algorithms.surrogate import Surrogate

ESS_WARN = 0.5
ESS_SKIP = 0.05


@torch.no_grad()
def loss_stats(mask_T: Tensor, batch: CleanBatch, guarded: Guarded, surrogate: Surrogate) -> dict[str, Tensor]:
    """Scalars: sums over the micro-batch, and `*_max`."""
    weight_T, keep_T = guarded.weight_T, guarded.keep_T
    stats = {
        "tokens": mask_T.count_nonzero(),
        "active": batch.active_T.count_nonzero(),
        "kept": keep_T.count_nonzero(),
        "policy_loss": surrogate.loss_T.dot(weight_T),
        "weight": weight_T.sum(),
        "weight_squared": weight_T.dot(weight_T),
    }
    flags = {
        "clipped_low": surrogate.clipped_low_T,
        "clipped_high": surrogate.clipped_high_T,
        "dual_clipped": surrogate.dual_clipped_T,
    }
    stats |= {name: (flag_T & keep_T).count_nonzero() for name, flag_T in flags.items() if flag_T is not None}
    if batch.reference_T is not None:
        stats |= {f"kl_{kind}": kl_estimate(batch.logp_T, batch.reference_T, kind).sum() for kind in ("k1", "k3")}
    if batch.entropy_T is not None:
        stats["entropy"] = batch.entropy_T.sum()
    return stats


@torch.no_grad()
def weight_stats(batch: CleanBatch, guarded: Guarded) -> dict[str, Tensor]:
    """Scalars about w before the guard; none where the objective has no importance weight."""
    log_w_T, raw_T = guarded.log_w_T, guarded.raw_T
    if log_w_T is None or raw_T is None:
        return {}
    active_N = segment_any(batch.active_T, batch.sequence_T, batch.num_sequences)
    log_w_N = segment_sum(log_w_T, batch.sequence_T, batch.num_sequences).clamp_(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    sequence_weight_N = log_w_N.exp_().masked_fill_(~active_N, 0.0)
    return {
        "raw_weight": raw_T.sum(),
        "raw_weight_squared": raw_T.dot(raw_T),
        "raw_weight_max": raw_T.max() if len(raw_T) else raw_T.new_zeros(()),
        "mismatch_k1": -log_w_T.sum(),
        "mismatch_abs": log_w_T.abs().sum(),
        "mismatch_k3": log_w_T.expm1().sub_(log_w_T).sum(),
        "sequences": active_N.count_nonzero(),
        "sequence_weight": sequence_weight_N.sum(),
        "sequence_weight_squared": sequence_weight_N.dot(sequence_weight_N),
    }


def add_stats(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of several micro-batches (or ranks) as one."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            else:
                total[name] = torch.maximum(total[name], value) if name.endswith("_max") else total[name] + value
    return total


def summarise(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of a step from the added statistics. Fractions are of the trainable tokens, before any guard."""
    value = {name: float(stat) for name, stat in stats.items()}
    tokens, active, kept = max(value["tokens"], 1.0), max(value["active"], 1.0), max(value["kept"], 1.0)
    metrics = {
        "tokens": value["tokens"],
        "kept_tokens": value["kept"],
        "stale_fraction": (value["tokens"] - value["active"]) / tokens,
        "guarded_fraction": (value["active"] - value["kept"]) / tokens,
        "policy_loss": value["policy_loss"] / tokens,
        "weight_mean": value["weight"] / kept,
        "ess": _ess(value["weight"], value["weight_squared"]),
    }
    metrics["ess_frac"] = metrics["ess"] / active
    clips = {
        "clipped_low": "clip_fraction_low",
        "clipped_high": "clip_fraction_high",
        "dual_clipped": "clip_fraction_dual",
    }
    metrics |= {metric: value[name] / tokens for name, metric in clips.items() if name in value}
    metrics["clip_fraction"] = metrics.get("clip_fraction_low", 0.0) + metrics.get("clip_fraction_high", 0.0)
    if "raw_weight" in value:
        metrics |= {
            "ess_frac_raw": _ess(value["raw_weight"], value["raw_weight_squared"]) / active,
            "raw_weight_max": value["raw_weight_max"],
            "mismatch_k1": value["mismatch_k1"] / active,
            "mismatch_k3": value["mismatch_k3"] / active,
            "mismatch_abs": value["mismatch_abs"] / active,
            "mismatch_chi2": value["raw_weight_squared"] / active - 1.0,
            "ppl_ratio": math.exp(min(value["mismatch_k1"] / active, 50.0)),
        }
    if "sequences" in value:
        total = _ess(value["sequence_weight"], value["sequence_weight_squared"])
        metrics["ess_frac_sequence"] = total / max(value["sequences"], 1.0)
    metrics |= {name: value[name] / active for name in ("kl_k1", "kl_k3", "entropy") if name in value}
    return metrics


def _ess(total: float, squared: float) -> float:
    return total * total / squared if squared > 0 else 0.0


def skip_reason(metrics: Mapping[str, float]) -> str | None:
    """Why the optimizer step must be skipped, None = take it. The version advances either way."""
    if metrics["kept_tokens"] == 0:
        return "every token was guarded"
    if metrics["ess_frac"] < ESS_SKIP:
        return f"effective sample size {metrics['ess_frac']:.3f} of the tokens, below {ESS_SKIP}"
    return None
