"""V-trace targets for off-policy values (IMPALA, Espeholt et al. 2018, arXiv:1802.01561, Eq. 1).

rho = min(rho_bar, r), c = min(c_bar, r), r = pi / mu
v_s = V_s + sum_t gamma^(t-s) (prod c) rho_t delta_t,   advantage = rho_s (r_s + gamma v_{s+1} - V_s)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VTrace(NamedTuple):
    targets_T: Tensor
    advantages_T: Tensor


@torch.no_grad()
def vtrace(
    rewards_T: Tensor,
    values_T: Tensor,
    ratios_T: Tensor,
    bootstrap: Tensor | float = 0.0,
    *,
    gamma: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """[T] targets and advantages of ONE sequence; `bootstrap` is the value after its end, 0 for a finished answer."""
    rho_T, c_T = ratios_T.clamp(max=rho_bar), ratios_T.clamp(max=c_bar)
    last = torch.as_tensor(bootstrap, dtype=values_T.dtype, device=values_T.device).reshape(1)
    next_values_T = torch.cat([values_T[1:], last])
    delta_T = rho_T * (rewards_T + gamma * next_values_T - values_T)
    corrections: list[Tensor] = []
    correction = torch.zeros_like(last[0])
    for delta, c in zip(reversed(delta_T.unbind()), reversed(c_T.unbind()), strict=True):
        correction = delta + gamma * c * correction
        corrections.append(correction)
    targets_T = values_T + torch.stack(corrections[::-1]) if corrections else values_T
    next_targets_T = torch.cat([targets_T[1:], last])
    return VTrace(targets_T, rho_T * (rewards_T + gamma * next_targets_T - values_T))
