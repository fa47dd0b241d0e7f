"""One optimiser step, whatever it trains: losses of micro-batches -> gradients -> reduce over ranks -> guard -> update.

    optimisation = Optimisation(module.parameters(), recipe.optimizer, steps, ranks)
    totals = optimisation.accumulate([lambda: loss_of(part) for part in parts])     # sums over micro-batches and ranks
    ... look at totals.values, decide ...
    metrics |= optimisation.update(step, totals, allowed=True)

The denominators of a loss are those of the whole step (all ranks, all micro-batches), so losses and gradients are
summed, and any split of a step gives the same update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from async_rl.algorithms.metrics import add_stats
from async_rl.config import Optimizer
from async_rl.errors import AsyncRLError
from async_rl.learner.distributed import Ranks
from async_rl.learner.gradients import clip_factor, gradients_of
from async_rl.learner.sharding import is_sharded

Stats: TypeAlias = dict[str, Tensor]
"""Detached scalars that add up over micro-batches and ranks, except `*_max`, which take the maximum."""
Loss: TypeAlias = Callable[[], tuple[Tensor, Stats]]
"""The forward pass of one micro-batch: its scalar part of the step's loss, and statistics."""


class Abandoned(AsyncRLError):
    """The step was given up between two micro-batches, because the learner stops; no weight has changed."""


class Totals(NamedTuple):
    """Of a whole step, the same on every rank."""

    loss: float
    grad_norm: float
    """Before clipping."""
    values: dict[str, float]
    """The statistics of the losses, summed."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def never() -> bool:
    """The default of `abandon`."""
    return False


def ignored() -> None:
    """The default of `last_begins`."""


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Of step number `step`, from 0, of `steps` in all. It depends on the number alone, so a resumed run needs no state
    of a schedule.

    Linear up to the full rate at step `warmup_steps`; then, down to `final_rate` of it at the last step,
        constant   not before the last `decay_steps`, then linear (WSD, arXiv 2404.06395)
        linear     at once
        cosine     half a period (SGDR without restarts, arXiv 1608.03983, eq. 5)
    """
    rate = optimizer.learning_rate
    if step + 1 < optimizer.warmup_steps:
        return rate * (step + 1) / optimizer.warmup_steps
    decay = optimizer.decay_steps if optimizer.schedule == "constant" else steps - optimizer.warmup_steps
    if decay <= 0:
        return rate
    done = min(max(0.0, (step + 1 - (steps - decay)) / decay), 1.0)
    fallen = (1 - math.cos(math.pi * done)) / 2 if optimizer.schedule == "cosine" else done
    return rate * (1 - (1 - optimizer.final_rate) * fallen)


class Optimisation:
    """Owns the gradients and the optimiser of some parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: Optimizer, steps: int, ranks: Ranks) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._config, self._steps, self._ranks = optimizer, steps, ranks
        self._gradients = gradients_of(trained, ranks)
        self._sharded = is_sharded(trained)
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def release_gradients(self) -> None:
        """Between two steps: free their memory until the next one."""
        self._gradients.release()

    def accumulate(
        self, losses: Sequence[Loss], abandon: Callable[[], bool] = never, last_begins: Callable[[], None] = ignored
    ) -> Totals:
        """Forward and backward passes of this rank's micro-batches, as many on every rank; no weight changes. Under
        torch.no_grad() forward passes alone: an evaluation, whose grad_norm is 0.

        last_begins: called when the last micro-batch of this rank begins.

        Raises:
            Abandoned: `abandon` said so on some rank.
        """
        training = torch.is_grad_enabled()
        if training:
            self._gradients.zero()
        stats: list[Stats] = []
        loss = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for number, compute in enumerate(losses, 1):
            if self._ranks.any(abandon()):
                raise Abandoned("the step was abandoned between two micro-batches; no weight has changed")
            if number == len(losses):
                last_begins()
            part, part_stats = compute()
            if part.requires_grad:
                part.backward()
            elif self._sharded and training:
                raise RuntimeError(
                    "a loss does not depend on the parameters: the other ranks would wait for its gradients"
                )
            loss += part.detach()
            stats.append(part_stats)
        norm = 0.0
        if training:
            self._gradients.reduce()
            norm = float(self._gradients.norm().double())
        values = self._reduce({**add_stats(stats), "loss": loss})
        return Totals(values.pop("loss"), norm, values)

    def update(self, step: int, totals: Totals, *, allowed: bool = True) -> dict[str, float]:
        """Change the weights, unless a number is not finite or `allowed` is False (a guard said no): then they stay as
        they were bit for bit, and the metrics say so. Every rank decides the same from the same numbers."""
        rate = learning_rate(self._config, step, self._steps)
        if totals.finite and allowed:
            factor = clip_factor(totals.grad_norm, self._config.clip_norm)
            if factor is not None:
                self._gradients.scale(factor)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        return {
            "learning_rate": rate,
            "skipped": float(not totals.finite or not allowed),
            "skipped_nonfinite": float(not totals.finite),
            "skipped_guarded": float(totals.finite and not allowed),
        }

    def _reduce(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over ranks (`*_max`: maxima) as plain numbers; one transfer from the device."""
        names = sorted(stats)
        together = torch.stack([stats[name].double() for name in names])
        highest = torch.tensor([name.endswith("_max") for name in names], device=together.device)
        if self._ranks.size > 1:
            maxima = together.clone()
            self._ranks.sum(together)
            self._ranks.maximum(maxima)
            together = torch.where(highest, maxima, together)
        return dict(zip(names, together.tolist(), strict=True))
