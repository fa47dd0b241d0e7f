"""Losses and normalisation of reward models.

    pair     -log sigmoid(s_w - s_l - margin)                     (Bradley-Terry; margin: Llama 2, 2307.09288, Eq. 2)
    K-wise   -(1 / C(K, 2)) sum over pairs log sigmoid(s_w - s_l)  (InstructGPT, arXiv:2203.02155, Eq. 1)
    safety   -log sigmoid(s) if safe else -log sigmoid(-s)         (DeepSeek-R1's harmlessness model)

All pairs of a prompt are one batch element, otherwise the model overfits. After training the mean score of the
reference answers is subtracted, so that they score 0. Ties do not count as correct.
Kimi k1.5 trained the classic reward model and the reasoning one on 800k examples each (84.4 against 98.5); the notes
give the data to the second alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    loss_B: Tensor
    accuracy: Tensor
    """Share of pairs with chosen strictly above rejected."""


def pair_loss(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | float = 0.0) -> PairLoss:
    """[B] Bradley-Terry loss, finite at any margin."""
    accuracy = (chosen_B > rejected_B).to(chosen_B.dtype).mean()
    return PairLoss(-logsigmoid(chosen_B - rejected_B - margin_B), accuracy)


def kwise_loss(ranked_K: Tensor) -> tuple[Tensor, int]:
    """Scalar loss and number of pairs of one prompt; scores ordered from best to worst."""
    best, worst = torch.triu_indices(len(ranked_K), len(ranked_K), offset=1).unbind()
    return -logsigmoid(ranked_K[best] - ranked_K[worst]).mean(), len(best)


def safety_loss(scores_B: Tensor, safe_B: Tensor) -> Tensor:
    """[B] pointwise loss of a safe / unsafe classifier."""
    return -logsigmoid(torch.where(safe_B, scores_B, -scores_B))


def normalise_scores(scores_B: Tensor, reference_scores_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B] scores and the bias subtracted from them, so that reference answers have mean 0. Store the bias."""
    bias = reference_scores_B.mean()
    return scores_B - bias, bias
