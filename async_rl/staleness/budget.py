"""Pure: keeps the share of masked tokens within its budget, by steering concurrency and, where that is too slow, by
letting the step wait (docs/decisions/2026-11-21-staleness-frontier.md: how this was found, and what it gives).

Fewer rollouts at once decode faster and are overtaken by fewer steps, so they mask less; more of them fill the engines.
The best number is the one at which the budget is nearly used up. It is found from the doomed tokens alone.
"""

from __future__ import annotations

from math import exp, log

AIM = 0.9
"""Share of the budget that is steered towards; the rest absorbs fluctuations."""
GAIN = 0.05
"""Largest relative change of the limit per step is twice this."""
SMOOTH = 0.3
"""Weight of the newest step in the mean of the pressure."""
SAVED_STEPS = 4
"""Budget that was not used can be saved up for so many steps."""
CALM_STEPS = 4
"""After so many steps in a row that nobody had to wait for, waiting is no longer what limits the speed."""
WAITING_LIMIT = 0.4
"""Without a budget the best concurrency is this many rollouts per rollout of a step and version of eta."""


class MaskBudget:
    """How many rollouts may run, and whether a step may be composed.

    Args:
        budget: share of the sampled tokens that may be masked; 0 = none, the step waits.
        max_staleness: eta, at least 1.
        step_rollouts: Q * G.
    """

    def __init__(self, budget: float, *, max_staleness: int, step_rollouts: int) -> None:
        self._budget = budget
        self._eta = max_staleness
        self._least = max_staleness * step_rollouts / 8
        self.limit = max_staleness * step_rollouts * WAITING_LIMIT if budget == 0 else float("inf")
        """Rollouts that may run at the same time."""
        self._saved = 0.0
        """Tokens that may be doomed beyond the budget of the next step."""
        self._mean: float | None = None
        """Of pressure / tokens of a batch."""
        self._pressure: tuple[int, int] | None = None
        """Of the step to come, at its first opportunity: (step, tokens)."""
        self._calm = CALM_STEPS
        """Steps since the last one that had to wait."""

    @property
    def exact(self) -> bool:
        """Nothing at all may be masked."""
        return self._budget == 0

    @property
    def waits(self) -> bool:
        """Without a budget: stragglers hold steps back. (With one, steering keeps waiting rare.)"""
        return self.exact and self._calm < CALM_STEPS

    def allows(self, step: int, pressure: int, batch_tokens: int) -> bool:
        """Whether the step may be composed now, with so many tokens of decoding rollouts doomed by it. Decoding goes on
        while it may not, so the pressure falls; without pressure, waiting would save nothing, whatever is owed."""
        if self._pressure is None or self._pressure[0] != step:
            self._pressure = step, pressure  # before any waiting, which would hide that there is too much at once
        allowed = pressure == 0 or pressure <= self._saved + self._budget * batch_tokens
        if not allowed:
            self._calm = -1
        return allowed

    def composed(self, step: int, doomed: int, batch_tokens: int, most: float) -> None:
        """The step is composed and doomed so many tokens. most: what the generators can run, 0 where none is there."""
        self._calm += 1
        allowance = self._budget * batch_tokens
        self._saved = min(self._saved + allowance - doomed, SAVED_STEPS * allowance)
        if self._budget == 0 or most == 0 or step < self._eta:  # before eta, nothing can be stale
            return
        pressure = self._pressure[1] if self._pressure is not None and self._pressure[0] == step else doomed
        share = pressure / max(1, batch_tokens)
        self._mean = share if self._mean is None else (1 - SMOOTH) * self._mean + SMOOTH * share
        error = log(AIM * self._budget / self._mean) if self._mean > 0 else 2.0
        self.limit = min(max(self._least, min(self.limit, most) * exp(GAIN * max(-2.0, min(2.0, error)))), most)
