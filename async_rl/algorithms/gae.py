"""Generalised advantage estimation over the trainable tokens (Schulman et al. 2015, arXiv:1506.02438, Eq. 16).

    delta_t = r_t + gamma V_t' - V_t,   A_t = delta_t + gamma lam A_t',   return = A + V

t' is the next trainable token of the same sequence: prompt, observation and injected tokens are stepped over, so their
values and rewards do not matter; V = 0 after the end. gamma = 1, lam = 0.95. Whiten A over the step, never the returns.
The notes write E[R - b] = A, which mixes an expectation with a sample: A = E[R | s, a] - V(s), and its mean over
actions is 0. The critic is a network of its own, started from the reward model (InstructGPT; the notes mix it with
Stiennon et al., whose value network is separate but started from the policy).
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.padded_rows import PaddedRows


@torch.no_grad()
def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """[T] advantages and [T] returns, 0 where not trainable. Tokens of a sequence are adjacent and in order."""
    rows = PaddedRows(mask_T, sequence_T)
    rewards_NL, values_NL = rows.pad(rewards_T.to(values_T.dtype)), rows.pad(values_T)
    advantages_NL = torch.zeros_like(values_NL)
    next_value_N = running_N = values_NL.new_zeros(len(values_NL))
    for t in reversed(range(values_NL.shape[1])):  # padding has r = V = 0 and comes first: it leaves both at 0
        running_N = rewards_NL[:, t] + gamma * next_value_N - values_NL[:, t] + gamma * lam * running_N
        advantages_NL[:, t], next_value_N = running_N, values_NL[:, t]
    return rows.flat(advantages_NL), rows.flat(advantages_NL + values_NL)
