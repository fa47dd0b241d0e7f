"""Whitening over the trainable tokens: (x - mean) / sqrt(var + eps), 0 elsewhere (verl, slime; ddof 1, eps 1e-8)."""

from __future__ import annotations

from torch import Tensor


def masked_whiten(x_T: Tensor, mask_T: Tensor, *, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """[T] whitened x. Give it all tokens of the step: statistics of one micro-batch would change with the packing."""
    count = mask_T.sum()
    mean = x_T.where(mask_T, 0.0).sum() / count.clamp(min=1)
    centred_T = (x_T - mean).where(mask_T, 0.0)
    variance = centred_T.square().sum() / (count - ddof).clamp(min=1)
    return centred_T / (variance + eps).sqrt()
