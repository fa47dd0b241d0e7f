"""What every policy-gradient surrogate returns: a value and a derivative per token, computed without autograd.

Each derivative is a formula of the paper, so that the backward pass keeps one tensor instead of every intermediate, and
a token without weight gets a gradient of exactly 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Surrogate(NamedTuple):
    """[T] per token, before weights and aggregation; None = the surrogate has no such clip.

    A surrogate of whole sequences writes each sequence's value to all of its tokens (or its share of it), so that the
    same aggregation serves every method.
    """

    loss_T: Tensor
    slope_T: Tensor
    """d loss / d logp of the token; for a surrogate of whole sequences, of the sequence's total."""
    clipped_low_T: Tensor | None = None
    clipped_high_T: Tensor | None = None
    dual_clipped_T: Tensor | None = None


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_T: Tensor, value: Tensor, slope_T: Tensor) -> Tensor:
        ctx.save_for_backward(slope_T)
        ctx.dtype = logp_T.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, None, None]:
        return (grads[0] * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def with_slope(logp_T: Tensor, value: Tensor, slope_T: Tensor) -> Tensor:
    """The scalar `value`, whose gradient with respect to `logp_T` is `slope_T`; also where logp is NaN."""
    return _WithSlope.apply(logp_T, value, slope_T)  # pyright: ignore[reportReturnType]
