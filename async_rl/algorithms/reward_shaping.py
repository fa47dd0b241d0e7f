"""KL in the reward (InstructGPT, arXiv:2203.02155, Eq. 2): r_t = -beta (logp - reference)_t + 1[t = last] score.

k1 of the sampling policy's own log-probs, without gradient and without clamp (AlpacaFarm clamps it at 0, which biases
the estimate upwards). The score sits on the last trainable token. beta: 0.02 InstructGPT, 0.05 Tulu 3. The environment
is a bandit: random prompt, one answer, one score, end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ShapedRewards(NamedTuple):
    kl_T: Tensor
    rewards_T: Tensor


@torch.no_grad()
def kl_shaped_rewards(
    logp_T: Tensor, reference_T: Tensor, score_N: Tensor, mask_T: Tensor, sequence_T: Tensor, *, beta: float = 0.02
) -> ShapedRewards:
    """[T] k1 and the shaped reward of each token; a missing score (NaN) counts as 0."""
    kl_T = (logp_T - reference_T).where(mask_T, 0.0)
    position_T = torch.arange(len(mask_T), device=mask_T.device)
    last_N = torch.full_like(score_N, -1, dtype=torch.int64).scatter_reduce(
        0, sequence_T, position_T.where(mask_T, -1), "amax"
    )
    rewards_T = -beta * kl_T
    trained_N = last_N >= 0
    rewards_T[last_N[trained_N]] += score_N.nan_to_num(nan=0.0)[trained_N].to(rewards_T.dtype)
    return ShapedRewards(kl_T, rewards_T)
