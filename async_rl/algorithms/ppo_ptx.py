"""PPO-ptx: a language-modelling term on pretraining text (InstructGPT, arXiv:2203.02155, Eq. 2). Off by default.

total = ppo_loss + gamma NLL(pretraining tokens),   gamma = 27.8 in the paper, 0 here
"""

from __future__ import annotations

from torch import Tensor


def ppo_ptx(
    ppo_loss: Tensor, pretrain_logp_T: Tensor, pretrain_mask_T: Tensor, *, gamma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean NLL of the pretraining tokens and the total; with gamma = 0 the total is `ppo_loss` itself."""
    nll = -pretrain_logp_T.where(pretrain_mask_T, 0.0).sum() / pretrain_mask_T.sum().clamp(min=1)
    return nll, ppo_loss + gamma * nll if gamma else ppo_loss
