"""What a loss reads and returns: tokens of a micro-batch, the normalisers of the whole step, the loss and its
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The packed tokens of one micro-batch. All tokens of a sequence are in the same micro-batch."""

    logp_T: Tensor
    """[T] log-prob of each token under the current policy, with gradient."""
    behaviour_T: Tensor
    """[T] log-prob under the distribution that really sampled it (temperature and truncation included)."""
    mask_T: Tensor
    """[T] bool, trainable: sampled by the policy itself, before any staleness rule."""
    sequence_T: Tensor
    """[T] int64, index of the token's sequence in `advantages_N`."""
    advantages_N: Tensor
    """[N] one advantage per sequence, broadcast to its tokens."""
    advantages_T: Tensor | None = None
    """[T] one advantage per token (a critic's); takes the place of `advantages_N`, whose length still gives N."""
    weight_mask_T: Tensor | None = None
    """[T] bool, False = past the hard staleness bound: exactly zero weight, still counted in the denominators."""
    proximal_T: Tensor | None = None
    """[T] log-prob at the start of the training step; None = the current policy without gradient."""
    reference_T: Tensor | None = None
    """[T] log-prob under the frozen reference; needed where `Objective.needs_reference`."""
    entropy_T: Tensor | None = None
    """[T] entropy of the token's distribution; with gradient where `Objective.entropy_coef` is not 0."""
    versions_T: Tensor | None = None
    """[T] int64, version that sampled the token, -1 = not the policy; only for `proximal = "loglinear"`."""
    current_version: int | None = None
    """Version the step starts from; only for `proximal = "loglinear"`."""

    @property
    def num_sequences(self) -> int:
        return self.advantages_N.shape[0]


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Denominators of one optimizer step, over all ranks and micro-batches, fixed before any guard edits a mask.

    They are numbers of the whole step, so that the sum of the micro-batch losses is the loss of the step however it is
    split.
    """

    tokens: float
    """Trainable tokens: the sum of `mask_T` over the step."""
    sequences: float
    """Sequences with at least one trainable token."""
    constant: float | None = None
    """C of `seq_mean_token_sum_norm`: the length a completion may have (max_new_tokens)."""
    all_sequences: float | None = None
    """Sequences with or without trainable tokens, used by `seq_mean_token_sum_norm`; None = `sequences`."""

    @staticmethod
    def of(mask_T: Tensor, sequence_T: Tensor, num_sequences: int, constant: float | None = None) -> Normaliser:
        """The normaliser of a step that consists of this one batch."""
        trained = torch.unique(sequence_T[mask_T.bool()]).numel()
        return Normaliser(
            tokens=int(mask_T.bool().sum()), sequences=trained, constant=constant, all_sequences=num_sequences
        )


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor
    """Scalar; the losses of the micro-batches of a step add up to the step's loss."""
    stats: dict[str, Tensor]
    """Detached scalars that add up over micro-batches and ranks, except `*_max`, which take the maximum."""
    weight_T: Tensor
    """[T] the importance weight each token was trained with, 0 where it had none."""
    loss_T: Tensor
    """[T] what each token adds to the loss, without the entropy bonus."""


class CleanBatch(NamedTuple):
    """TokenBatch as the parts read it: 0 outside `active_T`, without gradient."""

    logp_T: Tensor
    behaviour_T: Tensor
    proximal_T: Tensor
    reference_T: Tensor | None
    entropy_T: Tensor | None
    advantages_T: Tensor
    advantages_N: Tensor
    active_T: Tensor
    sequence_T: Tensor

    @property
    def num_sequences(self) -> int:
        return self.advantages_N.shape[0]
