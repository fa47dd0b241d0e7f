"""SAPO: a smooth gate in place of the clip (Gao et al. 2025, arXiv:2511.20347).

    loss = -(4 / tau) sigmoid(tau (u - 1)) A,   u = exp(logp - old),   tau = 1.0 where A > 0, else 1.05

The factor 4 / tau makes the gradient at u = 1 equal to PPO's. It decays on both sides, so no token is cut off abruptly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.surrogate import Surrogate


def sapo(
    logp_T: Tensor, old_T: Tensor, advantages_T: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Surrogate:
    ratio_T = log_ratio(logp_T, old_T).exp_()
    tau_T = torch.where(advantages_T > 0, tau_positive, tau_negative).to(ratio_T.dtype)
    gate_T = torch.sigmoid_((ratio_T - 1.0).mul_(tau_T))
    slope_T = ratio_T.mul_(gate_T).mul_(1.0 - gate_T).mul_(advantages_T).mul_(-4.0)
    return Surrogate(gate_T.div_(tau_T).mul_(advantages_T).mul_(-4.0), slope_T)
