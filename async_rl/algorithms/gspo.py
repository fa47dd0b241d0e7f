"""GSPO: one clipped ratio per sequence (Zheng et al. 2025, arXiv:2507.18071, Eq. 5-7).

    s = exp(mean_t(logp - old));  loss = -mean_i min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)

Defaults 3e-4 / 4e-4, far tighter than PPO's, because s is a geometric mean. Aggregate with `seq_mean_token_mean`.
The gradient of a token is that of GSPO-token (Eq. 13), s_t = sg[s] pi / sg[pi], so that a token without weight has
none. Trap: the mean is over the tokens with weight; padding or observations in it would shrink the ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.ppo_clip import ppo_clip
from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.segments import segment_mean
from async_rl.algorithms.surrogate import Surrogate


def sequence_ratio(logp_T: Tensor, old_T: Tensor, active_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """[N] s, the geometric mean of the token ratios."""
    return _log_sequence_ratio(logp_T, old_T, active_T, sequence_T, num_sequences).exp()


def gspo(
    logp_T: Tensor,
    old_T: Tensor,
    advantages_N: Tensor,
    active_T: Tensor,
    sequence_T: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Surrogate:
    """[T] the sequence's loss on each of its tokens."""
    log_s_N = _log_sequence_ratio(logp_T, old_T, active_T, sequence_T, len(advantages_N))
    sequences = ppo_clip(log_s_N, torch.zeros_like(log_s_N), advantages_N, clip_low=clip_low, clip_high=clip_high)
    low_N, high_N = sequences.clipped_low_T, sequences.clipped_high_T
    return Surrogate(
        sequences.loss_T.index_select(0, sequence_T),
        sequences.slope_T.index_select(0, sequence_T),
        None if low_N is None else low_N.index_select(0, sequence_T),
        None if high_N is None else high_N.index_select(0, sequence_T),
    )


def _log_sequence_ratio(
    logp_T: Tensor, old_T: Tensor, active_T: Tensor, sequence_T: Tensor, num_sequences: int
) -> Tensor:
    return segment_mean(log_ratio(logp_T, old_T, active_T), active_T, sequence_T, num_sequences)
