"""Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556, Eq. 9): drop bad samples the policy has moved away
from.

    drop sequence i  if  A_i < 0 and mean_t(behaviour - logp) > delta

Off by default; delta about 0.1 to 0.5 (slime 1e-4). Good samples are never dropped: they pull the policy back.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.segments import segment_mean


class OPSM(NamedTuple):
    seq_kl_N: Tensor
    keep_N: Tensor


def opsm_mask(
    logp_T: Tensor,
    behaviour_T: Tensor,
    advantages_N: Tensor,
    active_T: Tensor,
    sequence_T: Tensor,
    *,
    delta: float = 0.1,
) -> OPSM:
    """[N] mean log-ratio of each sequence and whether it stays."""
    seq_kl_N = segment_mean(log_ratio(behaviour_T, logp_T, active_T), active_T, sequence_T, advantages_N.shape[0])
    return OPSM(seq_kl_N, ~((advantages_N < 0) & (seq_kl_N > delta)))
