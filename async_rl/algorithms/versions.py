"""Lag of tokens behind the version that trains on them, and the mask that a bound on it makes.

lag = current_version - version of the token; -1 marks tokens the policy did not sample. Head lag = lag of the first
trainable token, the oldest of the rollout.
Segment mask (Kimi k1.5's partial rollouts): the report says that earlier segments CAN be left out; with recorded
behaviour log-probs importance weighting is the better default, so this is an option. Kimi k1.5 itself is iterative and
synchronous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from async_rl.algorithms.segments import segment_sum


class Lag(NamedTuple):
    head_N: Tensor
    max_N: Tensor
    token_mean: Tensor
    num_versions_N: Tensor


def version_lag(
    versions_T: Tensor, mask_T: Tensor, sequence_T: Tensor, num_sequences: int, *, current_version: int
) -> Lag:
    """Lags of the trainable tokens; 0 for a sequence without any."""
    index_M = mask_T.nonzero().squeeze(1)
    lag_M, row_M = current_version - versions_T[index_M], sequence_T[index_M]
    zero_N = lag_M.new_zeros(num_sequences)
    max_N = zero_N.scatter_reduce(0, row_M, lag_M, "amax", include_self=False)
    first_N = torch.full_like(zero_N, -1).scatter_reduce(
        0, row_M, torch.arange(len(row_M), device=row_M.device), "amin", include_self=False
    )
    head_N = torch.where(first_N >= 0, lag_M[first_N.clamp(min=0)] if len(lag_M) else zero_N, 0)
    pairs = torch.unique(torch.stack([row_M, lag_M], 1), dim=0)
    num_versions_N = segment_sum(torch.ones_like(pairs[:, 0]), pairs[:, 0], num_sequences)
    return Lag(head_N, max_N, lag_M.double().mean(), num_versions_N)


def segment_mask(versions_T: Tensor, mask_T: Tensor, *, min_version: int) -> Tensor:
    """[T] bool: trainable tokens sampled by `min_version` or later. The hard bound is min_version = current - eta."""
    return mask_T & (versions_T >= min_version)
