"""Trained tokens of each sequence in a row of their own, zeros after its end: one pass over time for all sequences."""

from __future__ import annotations

import torch
from torch import Tensor


class PaddedRows:
    """N sequences that have trained tokens, L tokens of the longest."""

    def __init__(self, mask_T: Tensor, sequence_T: Tensor) -> None:
        """Tokens of a sequence are adjacent and in order; those outside of `mask_T` are stepped over."""
        self._tokens = len(mask_T)
        self._index_M = mask_T.nonzero().squeeze(1)
        together = torch.unique_consecutive(sequence_T[self._index_M], return_inverse=True, return_counts=True)
        self._row_M, length_N = together[1:]
        start_N = length_N.cumsum(0) - length_N
        self._column_M = torch.arange(len(self._index_M), device=mask_T.device) - start_N[self._row_M]
        self._shape = len(length_N), int(length_N.max()) if len(length_N) else 0

    def pad(self, x_T: Tensor) -> Tensor:
        """[N, L]"""
        x_NL = x_T.new_zeros(self._shape)
        x_NL[self._row_M, self._column_M] = x_T[self._index_M]
        return x_NL

    def flat(self, x_NL: Tensor) -> Tensor:
        """[T], 0 where a token is not trained."""
        x_T = x_NL.new_zeros(self._tokens)
        x_T[self._index_M] = x_NL[self._row_M, self._column_M]
        return x_T
