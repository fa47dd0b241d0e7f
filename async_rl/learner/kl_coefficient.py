"""beta of the KL in the reward: fixed, or learner state that `kl_target` steers (algorithms.adaptive_kl).

The KL that it sees is the penalty before beta: sum_t (behaviour - reference)_t of each rollout, averaged over the whole
step. Every rank holds that and computes the same coefficient; checkpoints keep it (checkpoint.Position).
"""

from __future__ import annotations

import math

from torch import Tensor

from async_rl.algorithms.adaptive_kl import adaptive_kl
from async_rl.algorithms.objective import Objective


class KLCoefficient:
    def __init__(self, objective: Objective) -> None:
        self._target, self._horizon = objective.kl_target, objective.kl_horizon
        self.value = objective.kl_coef
        """Of the step that is trained on now."""

    @property
    def saved(self) -> float | None:
        """What a checkpoint keeps; None: it is fixed."""
        return None if self._target is None else self.value

    def restore(self, saved: float | None) -> None:
        self.value = self.value if saved is None else saved

    def update(self, kl_N: Tensor) -> None:
        """After a step, for the next one.

        kl_N: nats of each rollout of the step. Where there is none, or one is not a number, the coefficient stays.
        """
        kl = mean(kl_N)
        if self._target is not None and math.isfinite(kl):
            self.value = adaptive_kl(self.value, kl, len(kl_N), target=self._target, horizon=self._horizon)


def mean(kl_N: Tensor) -> float:
    """In the order of the rollouts whatever the machine, so that ranks agree to the last bit; NaN of nothing."""
    return sum(kl_N.tolist()) / len(kl_N) if len(kl_N) else math.nan
