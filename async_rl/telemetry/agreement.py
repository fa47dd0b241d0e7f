"""Pure: how far apart engine and learner may be on the log-probs of the same tokens under the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from async_rl.config import Run


class Limits(NamedTuple):
    mean: float
    """Of the absolute differences, nats."""
    k3: float
    """Mean of w - 1 - log w, w = p_learner / p_engine: an estimate of the KL divergence, never negative."""

    def hold(self, mean: float, k3: float, slack: float = 1.0) -> bool:
        """slack: the difference may be so many times as large, and k3 by its square. NaN is over every limit."""
        return mean <= slack * self.mean and k3 <= slack**2 * self.k3


LIMITS = {"float32": Limits(1e-3, 1e-5), "bfloat16": Limits(0.06, 5e-3)}
"""By dtype. Measured on SmolLM2-135M at temperature 1: mean 7e-6 and k3 4e-11 in float32; 0.026 to 0.031 and 7e-4 to
1.2e-3 with one side in bfloat16; 0.037 to 0.041 and 1.7e-3 to 1.9e-3 with both."""


def limits(*dtypes: str) -> Limits:
    """By the coarsest of these. `auto` may be bfloat16, until each process has said what it is on its machine."""
    found = [LIMITS["bfloat16" if dtype == "auto" else dtype] for dtype in dtypes]
    return Limits(max(one.mean for one in found), max(one.k3 for one in found))


def limit_of(rows: Sequence[dict[str, Any]], run: Run) -> float:
    """Nats on average, as of the newest step of a run."""
    known = rows[-1].get("equal_version_limit") if rows else None
    return limits(run.generator.dtype, run.learner.dtype).mean if known is None else known
