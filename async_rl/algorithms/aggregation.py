"""From per-token losses to a scalar: four modes, with the denominators of the whole step.

    seq_mean_token_mean       mean over sequences of the mean over tokens (GRPO; CS336)
    token_mean                sum / trainable tokens (DAPO; default)
    seq_mean_token_sum        mean over sequences of the sum over tokens
    seq_mean_token_sum_norm   sum / (sequences * C), C = max_new_tokens (Dr. GRPO)

Length bias comes from 1/|o_i|: it favours short answers where A > 0 and long ones where A < 0. The notes blame the std
(which causes the difficulty bias) and propose to normalise the reward by length; a constant normaliser is the cure.
"PPO averages single samples" (the notes) is wrong as well: it averages over all tokens of the batch.
Sequences without trainable tokens are not counted, except by `_norm`. |o_i| and the totals are counted before any
guard.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from async_rl.algorithms.batch import Normaliser
from async_rl.algorithms.segments import segment_sum

Aggregation = Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]


def token_scale(
    mask_T: Tensor, sequence_T: Tensor, num_sequences: int, normaliser: Normaliser, mode: Aggregation = "token_mean"
) -> Tensor | float:
    """[T] or one number: what a token's loss is multiplied by before the sum. `mask_T` is the mask before any guard."""
    match mode:
        case "token_mean":
            return 1.0 / max(normaliser.tokens, 1)
        case "seq_mean_token_mean":
            length_N = segment_sum(mask_T.float(), sequence_T, num_sequences).clamp_(min=1.0)
            return length_N.mul_(max(normaliser.sequences, 1)).reciprocal_().index_select(0, sequence_T)
        case "seq_mean_token_sum":
            return 1.0 / max(normaliser.sequences, 1)
        case "seq_mean_token_sum_norm":
            if not normaliser.constant:
                raise ValueError(
                    "aggregation = 'seq_mean_token_sum_norm' needs Normaliser.constant, e.g. max_new_tokens"
                )
            sequences = normaliser.sequences if normaliser.all_sequences is None else normaliser.all_sequences
            return 1.0 / (max(sequences, 1) * normaliser.constant)


def aggregate(
    loss_T: Tensor,
    mask_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    normaliser: Normaliser,
    mode: Aggregation = "token_mean",
) -> Tensor:
    """Scalar: this micro-batch's part of the step's loss."""
    return (loss_T.where(mask_T, 0.0) * token_scale(mask_T, sequence_T, num_sequences, normaliser, mode)).sum()


def masked_normalize(x_T: Tensor, mask_T: Tensor, sequence_T: Tensor, num_sequences: int, constant: float) -> Tensor:
    """[N] sum of x over the masked tokens of each sequence, divided by a constant instead of their number."""
    return segment_sum(x_T.where(mask_T, 0.0), sequence_T, num_sequences) / constant
