"""V-trace targets for off-policy values (IMPALA, Espeholt et al. 2018, arXiv:1802.01561, Eq. 1).

rho = min(rho_bar, r), c = lam min(c_bar, r), r = pi / mu,   delta_t = r_t + gamma V_t' - V_t
v_s = V_s + sum_t gamma^(t-s) (prod c) rho_t delta_t,   advantage = r_s + gamma (lam v_s' + (1 - lam) V_s') - V_s

rho_bar says which policy's values these are (inf: those of pi, 1: those of one between mu and pi), c_bar <= rho_bar how
far back a difference is felt, that is their variance. lam is Remark 2; it mixes v and V in the advantage too, which the
paper leaves open, so that on policy with rho_bar, c_bar >= 1 all of this is GAE, targets and advantages.

Trap: the policy gradient is rho_s * advantage * grad log pi, with rho ONCE. A surrogate with a ratio of its own (PPO's
u, a guarded w) has it already and takes the advantage as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from async_rl.algorithms.padded_rows import PaddedRows


class VTrace(NamedTuple):
    """[T] each, 0 where not trainable."""

    targets_T: Tensor
    advantages_T: Tensor
    """Without rho."""
    rho_T: Tensor


@torch.no_grad()
def vtrace(
    rewards_T: Tensor,
    values_T: Tensor,
    ratios_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """Tokens of a sequence are adjacent and in order; t' is the next trainable one, V = 0 after the end, as in gae.py.

    ratios_T: [T] current policy / behaviour.
    """
    rows = PaddedRows(mask_T, sequence_T)
    rewards_NL, values_NL = rows.pad(rewards_T.to(values_T.dtype)), rows.pad(values_T)
    ratios_NL = rows.pad(ratios_T.to(values_T.dtype))
    rho_NL, c_NL = ratios_NL.clamp(max=rho_bar), lam * ratios_NL.clamp(max=c_bar)
    advantages_NL, targets_NL = torch.zeros_like(values_NL), torch.zeros_like(values_NL)
    next_value_N = correction_N = values_NL.new_zeros(len(values_NL))  # correction: v - V
    for t in reversed(range(values_NL.shape[1])):  # padding has r = V = rho = 0 and comes first: it leaves both at 0
        value_N = values_NL[:, t]
        delta_N = rewards_NL[:, t] + gamma * next_value_N - value_N
        advantages_NL[:, t] = delta_N + gamma * lam * correction_N
        correction_N = rho_NL[:, t] * delta_N + gamma * c_NL[:, t] * correction_N
        targets_NL[:, t], next_value_N = value_N + correction_N, value_N
    return VTrace(rows.flat(targets_NL), rows.flat(advantages_NL), rows.flat(rho_NL))
