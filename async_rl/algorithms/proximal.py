"""Log-linear proximal log-probs without a forward pass (A-3PO, arXiv:2512.06547).

    alpha = clip((v_now - 1 - v) / (v_now - v), 0, 1), 0 where v < 0 or v = v_now
    proximal = behaviour + alpha (sg[logp] - behaviour)

The older a token, the closer its proximal policy is taken to be to the current one. The alternative, and the default,
is to recompute: one no-gradient forward of the weights at the start of the training step, reused for all its
mini-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loglinear_alpha(versions_T: Tensor, current_version: int) -> Tensor:
    """[T] share of the current policy; versions are -1 for tokens the policy did not sample."""
    age_T = (current_version - versions_T).float()
    alpha_T = (age_T - 1).div_(age_T).clamp_(0.0, 1.0)  # age 0 gives -1 / 0 = -inf, hence 0
    return alpha_T.masked_fill_(versions_T < 0, 0.0)


def loglinear_proximal(behaviour_T: Tensor, logp_T: Tensor, versions_T: Tensor, current_version: int) -> Tensor:
    alpha_T = loglinear_alpha(versions_T, current_version).to(behaviour_T.dtype)
    return torch.lerp(behaviour_T, logp_T, alpha_T)
