"""Gradients of all parameters in one contiguous buffer: reducing, measuring and scaling them is one pass each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from async_rl.learner.distributed import Ranks

BUCKET_ELEMENTS = 1 << 24
"""64 MB of fp32 in one all-reduce."""


class FlatGradients:
    """`parameter.grad` of every parameter is a view of `flat`; the backward pass adds to it in place."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        first = self._parameters[0]
        total = sum(parameter.numel() for parameter in self._parameters)
        self.flat = torch.zeros(total, dtype=first.dtype, device=first.device)
        self._views = [
            part.view(parameter.shape)
            for part, parameter in zip(
                self.flat.split([parameter.numel() for parameter in self._parameters]), self._parameters, strict=True
            )
        ]

    def zero(self) -> None:
        """Start a step: everything 0, and every `.grad` in place again should someone have replaced it."""
        self.flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def reduce(self, ranks: Ranks) -> None:
        """Sum over ranks; every rank's loss is already divided by the denominators of the whole step."""
        for bucket in self.flat.split(BUCKET_ELEMENTS):
            ranks.sum(bucket)

    def norm(self) -> Tensor:
        """Scalar, on the device of the gradients."""
        return torch.linalg.vector_norm(self.flat)

    def clip(self, norm: float, limit: float) -> None:
        """Scale down to `limit`, by the rule of torch.nn.utils.clip_grad_norm_; a limit of 0 changes nothing."""
        scale = limit / (norm + 1e-6)
        if limit > 0 and scale < 1.0:
            self.flat.mul_(scale)
