"""The clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347, Eq. 7), with clip-higher and dual clip.

    u = exp(logp - old);  objective = min(u A, clip(u, 1 - clip_low, 1 + clip_high) A);  loss = -objective
    dual clip (Ye et al. 2020, 1912.09729, Eq. 5), A < 0 only: objective = max(objective, c A)

Defaults: .2 / .2 (PPO, GRPO), .2 / .28 (DAPO, 2503.14476, Eq. 10), 10 / 10 (DeepSeek-R1, which the notes
give .1 to .2; both presets exist), dual c = 3.

The lecture code divides log-probs (log_probs / old_log_probs) and calls it the ratio; here it is exp(logp - old), per
token, where the notes write one ratio per sequence. "The ratio is forced into the band" holds on the outward side only:
the gradient is 0 where (A > 0, u > 1 + clip_high) or (A < 0, u < 1 - clip_low) or (A < 0, u > c), and -A u everywhere
else. Trap: the ratio needs old without gradient; without the stop-gradient it is 1 and its derivative 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.surrogate import Surrogate


def ppo_clip(
    logp_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Surrogate:
    """[T] clipped policy loss. Clipped = the clipped branch was strictly chosen."""
    ratio_T = log_ratio(logp_T, old_T).exp_()
    bounded_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high).mul_(advantages_T)
    free_T = ratio_T.mul_(advantages_T)
    clipped_T = bounded_T < free_T
    loss_T = torch.minimum(free_T, bounded_T, out=bounded_T).neg_()
    slope_T = free_T.neg_().masked_fill_(clipped_T, 0.0)
    dual_T = None
    if dual_clip is not None:  # c |A| bounds the loss: where A >= 0 the loss is <= 0 already
        bound_T = advantages_T.abs().mul_(dual_clip)
        dual_T = loss_T > bound_T
        torch.minimum(loss_T, bound_T, out=loss_T)
        slope_T.masked_fill_(dual_T, 0.0)
    positive_T = advantages_T > 0
    return Surrogate(loss_T, slope_T, clipped_T & ~positive_T, clipped_T & positive_T, dual_T)
