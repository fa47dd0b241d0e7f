"""Guards on the importance weight w = exp(proximal - behaviour) of asynchronous training (no gradient).

    name           weight of a kept token           token leaves the loss when
    none           w                                never; corrects the action, not the distribution of prefixes
    truncate       min(w, high)                     never (TIS, high = 2: slime, verl, SkyRL)
    clip           clip(w, low, high)               never (CIS, .5 / 2)
    mask           w                                w outside [low, high] (IcePop .5 / 5; AReaL legacy high = 5 alone)
    seq_truncate   min(prod w, high)                never
    seq_mask       prod w                           prod w outside [low, high] (TRL's sequence_mask, 3)
    geo_truncate   min(exp mean log w, high)        never
    geo_mask       exp mean log w                   exp mean log w outside [low, high] (verl: .9999 / 1.0001)

Bounds are inclusive; None = no bound. `veto`: one token with w below it removes its whole sequence (slime, 1e-4).
Trap: clip acts on u (trust region), guards on w (data quality), a veto on whole samples: never one ratio for two of
these. A guarded token leaves the numerator only; the denominator keeps it, otherwise dropping tokens would raise the
step size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from async_rl.algorithms.ratios import LOG_RATIO_BOUND, log_ratio
from async_rl.algorithms.segments import segment_any, segment_mean, segment_sum

Guard = Literal["none", "truncate", "clip", "mask", "seq_truncate", "seq_mask", "geo_truncate", "geo_mask"]


class Guarded(NamedTuple):
    log_w_T: Tensor | None
    """[T] log w before the guard, 0 where not active; None = the objective has no importance weight."""
    raw_T: Tensor | None
    """[T] w before the guard, 0 where not active."""
    weight_T: Tensor
    """[T] w after the guard, 0 where the token has left the loss."""
    keep_T: Tensor
    """[T] bool: active and not guarded away."""


def guard_weights(
    proximal_T: Tensor,
    behaviour_T: Tensor,
    active_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    *,
    guard: Guard = "mask",
    low: float | None = 0.5,
    high: float | None = 5.0,
    veto: float | None = 1e-4,
) -> Guarded:
    """[T] weights of the active tokens. Sequence-level guards need all tokens of a sequence in the batch."""
    log_w_T = log_ratio(proximal_T, behaviour_T, active_T)
    raw_T = log_w_T.exp().masked_fill_(~active_T, 0.0)
    match guard.partition("_")[0]:
        case "seq":
            log_w_N = segment_sum(log_w_T, sequence_T, num_sequences).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            weight_T = log_w_N.exp()[sequence_T]
        case "geo":
            weight_T = segment_mean(log_w_T, active_T, sequence_T, num_sequences).exp()[sequence_T]
        case _:
            weight_T = raw_T
    drop_T = ~active_T
    if guard.endswith("mask"):
        # a NaN weight is neither below nor above: it stays in the loss, where the learner sees it
        drop_T = drop_T if low is None else drop_T | (weight_T < low)
        drop_T = drop_T if high is None else drop_T | (weight_T > high)
    elif guard != "none" and (low is not None or high is not None):
        weight_T = weight_T.clamp(low, high)
    if veto is not None:
        vetoed_N = segment_any(active_T & (raw_T < veto), sequence_T, num_sequences)
        drop_T = drop_T | vetoed_N.index_select(0, sequence_T)
    return Guarded(log_w_T, raw_T, weight_T.masked_fill(drop_T, 0.0), ~drop_T)
