"""Reductions over the sequences of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """[N] sum of x over the tokens of each sequence; 0 for a sequence without tokens."""
    return x_T.new_zeros(num_sequences).index_add(0, sequence_T, x_T)


def segment_mean(x_T: Tensor, mask_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """[N] mean of x over the tokens of each sequence where mask is set; 0 for a sequence without such tokens."""
    total_N = segment_sum(x_T.where(mask_T, 0.0), sequence_T, num_sequences)
    return total_N / segment_sum(mask_T.to(x_T.dtype), sequence_T, num_sequences).clamp(min=1.0)


def segment_any(flag_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """[N] bool, True for a sequence with at least one flagged token."""
    flag_N = flag_T.new_zeros(num_sequences).view(torch.uint8)
    return flag_N.scatter_reduce_(0, sequence_T, flag_T.view(torch.uint8), "amax").view(torch.bool)
