"""KL over the whole vocabulary, and the expectations of its sampled estimators: the yardstick of kl.py."""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.algorithms.kl import KLEstimator, kl_estimate


def exact_kl(logits_BV: Tensor, reference_BV: Tensor) -> Tensor:
    """[B] KL(softmax(logits) || softmax(reference)), differentiable in both."""
    logp_BV, reference_BV = torch.log_softmax(logits_BV, -1), torch.log_softmax(reference_BV, -1)
    return (logp_BV.exp() * (logp_BV - reference_BV)).sum(-1)


def expected_estimate(
    logits_V: Tensor,
    reference_V: Tensor,
    kind: KLEstimator,
    *,
    sampler_V: Tensor | None = None,
    ratio_weighted: bool = False,
) -> Tensor:
    """E[estimate] over one draw from `sampler_V` (probabilities; None = the policy); the draw itself has no gradient.

    The gradient of the result is therefore E[grad estimate], what a sampled loss follows on average. `ratio_weighted`
    multiplies by pi / sampler, gradient included: then value and gradient are those of the KL, whoever sampled.
    """
    logp_V, reference_V = torch.log_softmax(logits_V, -1), torch.log_softmax(reference_V, -1)
    sampler_V = logp_V.detach().exp() if sampler_V is None else sampler_V
    weight_V = logp_V.exp() if ratio_weighted else sampler_V  # sampler * (pi / sampler)
    return (weight_V * kl_estimate(logp_V, reference_V, kind)).sum()
