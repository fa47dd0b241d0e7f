"""Gradients of all parameters of an optimiser: set to zero, summed over ranks, measured, scaled.

replicated parameters   in one contiguous buffer, so that each of these is one pass
sharded ones            each rank has its rows; the backward pass itself sums them over ranks (learner.sharding)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from async_rl.learner.distributed import Ranks
from async_rl.learner.sharding import is_sharded, local

BUCKET_ELEMENTS = 1 << 24
"""64 MB of fp32 in one all-reduce."""


class Gradients(Protocol):
    def zero(self) -> None:
        """Start a step: everything 0."""
        ...

    def reduce(self) -> None:
        """Sum over ranks; every rank's loss is already divided by the denominators of the whole step."""
        ...

    def norm(self) -> Tensor:
        """Scalar, over all parameters and ranks, on the device of the gradients."""
        ...

    def scale(self, factor: float) -> None: ...

    def release(self) -> None:
        """Hold no memory until the next `zero`."""
        ...


def gradients_of(parameters: Iterable[nn.Parameter], ranks: Ranks) -> Gradients:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return ShardedGradients(trained, ranks) if is_sharded(trained) else FlatGradients(trained, ranks)


def clip_factor(norm: float, limit: float) -> float | None:
    """By the rule of torch.nn.utils.clip_grad_norm_; None: nothing to do. A limit of 0 never clips."""
    factor = limit / (norm + 1e-6)
    return factor if limit > 0 and factor < 1.0 else None


class FlatGradients:
    """`parameter.grad` of every parameter is a view of `flat`; the backward pass adds to it in place."""

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks
        self.flat = torch.empty(0)
        self._views: list[Tensor] = []

    def zero(self) -> None:
        """Also puts every `.grad` in place again should someone have replaced it."""
        if self._views:
            self.flat.zero_()
        else:
            self._allocate()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def release(self) -> None:
        self.flat, self._views = torch.empty(0), []
        for parameter in self._parameters:
            parameter.grad = None

    def _allocate(self) -> None:
        """Where the parameters are now."""
        first = self._parameters[0]
        sizes = [parameter.numel() for parameter in self._parameters]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = zip(self.flat.split(sizes), self._parameters, strict=True)
        self._views = [part.view(parameter.shape) for part, parameter in parts]

    def reduce(self) -> None:
        for bucket in self.flat.split(BUCKET_ELEMENTS):
            self._ranks.sum(bucket)

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.flat)

    def scale(self, factor: float) -> None:
        self.flat.mul_(factor)


class ShardedGradients:
    """`parameter.grad` of every parameter holds this rank's rows of the sum over ranks."""

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def reduce(self) -> None:
        """Done already. A parameter that no loss depends on has a gradient of 0 from now on, as a replicated one."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def norm(self) -> Tensor:
        parts = self._parts()
        mine = get_total_norm(parts) if parts else torch.zeros(())
        squared = mine.to(self._ranks.device, torch.float64).square()
        self._ranks.sum(squared)
        return squared.sqrt()

    def scale(self, factor: float) -> None:
        for part in self._parts():
            part.mul_(factor)

    def release(self) -> None:
        self.zero()

    def _parts(self) -> list[Tensor]:
        """A tensor of few rows may have none here."""
        parts = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        return [part for part in parts if part.numel()]
