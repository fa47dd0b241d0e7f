"""Model merging: a weighted average of two models' weights (Kimi k1.5's long2short, alpha = 0.5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def merge_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, alpha: float = 0.5) -> dict[str, Tensor]:
    """alpha a + (1 - alpha) b per tensor, computed in fp32 and returned in a's dtype.

    Raises:
        ValueError: the models have different tensors or shapes.
    """
    if a.keys() != b.keys():
        raise ValueError(f"models have different tensors: {', '.join(sorted(a.keys() ^ b.keys()))}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"{name}: shapes {tuple(a[name].shape)} and {tuple(b[name].shape)} differ")
    return {name: _average(a[name], b[name], alpha) for name in a}


def _average(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.lerp(b.to(wide), a.to(wide), alpha).to(a.dtype)
