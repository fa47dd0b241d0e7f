"""M2PO's mask: bound the second moment of the log-ratio of a batch (Zheng et al. 2025, arXiv:2510.01161).

Drop the tokens with the largest (proximal - behaviour)^2 until the mean over the remaining ones is below tau (0.04).
Trap: it needs the whole step at once, because the threshold depends on all tokens; so it is no part of an Objective.
Take the threshold over the step, and put `keep` into `TokenBatch.weight_mask_T`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio


class M2PO(NamedTuple):
    keep_T: Tensor
    second_moment: Tensor
    """Mean squared log-ratio of the kept tokens."""


def m2po_mask(proximal_T: Tensor, behaviour_T: Tensor, mask_T: Tensor, *, tau: float = 0.04) -> M2PO:
    squared_T = log_ratio(proximal_T, behaviour_T, mask_T).square()
    index_M = mask_T.nonzero().squeeze(1)
    ordered_M, order_M = squared_T[index_M].sort(stable=True)
    mean_M = ordered_M.cumsum(0) / torch.arange(1, len(ordered_M) + 1, device=ordered_M.device)
    num_kept = int((mean_M < tau).sum())  # running means of sorted values only rise
    keep_T = torch.zeros_like(mask_T)
    keep_T[index_M[order_M[:num_kept]]] = True
    return M2PO(keep_T, mean_M[num_kept - 1] if num_kept else squared_T.new_zeros(()))
