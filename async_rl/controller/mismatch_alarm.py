"""Says so when the engines' log-probs are not the learner's, although both computed them with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from async_rl.config import Run
from async_rl.telemetry.agreement import Limits, limits

ENOUGH_TOKENS = 256
"""Steps with fewer tokens at equal version are taken together: rounding makes a single token differ by much."""
IN_A_ROW = 3


class MismatchAlarm:
    """`step` for every step that is done; `say` gets a line when it begins and one when it is over."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._dtypes = {"generator": run.generator.dtype, "learner": run.learner.dtype}
        """As the recipe has them, by role; then of each process of that role, by name."""
        self._say = say
        self._tokens = self._gap = self._k3 = 0.0
        self._over = 0
        """Comparisons in a row that were over a limit."""

    @property
    def limits(self) -> Limits:
        return limits(*self._dtypes.values())

    def computes(self, role: str, name: str, dtype: str) -> None:
        """A process said in which dtype it computes log-probs. What sampled in it may be trained on long after it has
        gone, so that it is not forgotten."""
        if dtype:
            self._dtypes.pop(role, None)
            self._dtypes[f"{role} {name}"] = dtype

    @property
    def on(self) -> bool:
        """It was said, and is not over."""
        return self._over >= IN_A_ROW

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step without a token at equal version says nothing about it."""
        tokens = metrics.get("equal_version_tokens", 0.0)
        if tokens == 0:
            return
        self._tokens += tokens
        self._gap += tokens * metrics["equal_version_gap"]
        self._k3 += tokens * metrics["equal_version_k3"]
        if self._tokens >= ENOUGH_TOKENS:
            gap, k3 = self._gap / self._tokens, self._k3 / self._tokens
            self._tokens = self._gap = self._k3 = 0.0
            self._compared(step, gap, k3)

    def _compared(self, step: int, gap: float, k3: float) -> None:
        limits = self.limits
        if limits.hold(gap, k3):
            if self._over >= IN_A_ROW:
                self._say(f"engine and learner agree on log-probs again (step {step}: {gap:.2g} nats)")
            self._over = 0
            return
        self._over += 1
        if self._over == IN_A_ROW:
            self._say(
                f"engine and learner do not agree on log-probs under the same weights, {IN_A_ROW} times in a row (step "
                f"{step}: mean difference {gap:.2g} nats, limit {limits.mean:g}; k3 {k3:.2g}, limit "
                f"{limits.k3:g}): another temperature, a truncation such as top-p, a dtype, a cache that "
                "outlived its weights, or weights that did not arrive; `async-rl doctor RECIPE` looks for the cause"
            )
