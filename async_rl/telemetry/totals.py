"""Pure: what a controller adds up since it started, for the counters and histograms of /metrics.

What must survive a restart is in the ledger (records.RunRecord). These begin again at 0, as counters of a process do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from async_rl.telemetry.journal import Row

STEP_BOUNDS_S = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SWAP_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Of weights on their way, and of the stall that taking them costs."""
CHECKPOINT_BOUNDS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
MAX_LAG_BOUNDS = 16
"""Buckets of lags; a wider staleness bound is cut into ranges."""


class Histogram:
    """Counts of values by upper bound, and their sum.

    >>> seconds = Histogram((1.0, 10.0))
    >>> seconds.add(0.5); seconds.add(10.0); seconds.add(99.0, 2)
    >>> seconds.buckets(), seconds.sum
    ([('1.0', 1), ('10.0', 2), ('+Inf', 4)], 208.5)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, int]]:
        """(upper bound, values up to it), the last bound +Inf."""
        found: list[tuple[str, int]] = []
        below = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            below += count
            found.append((str(bound), below))
        return found


class Totals:
    """One per controller.

    Args:
        max_staleness: eta; a bound of the lag histogram lies exactly there.
    """

    def __init__(self, max_staleness: int) -> None:
        self.lag = Histogram(lag_bounds(max_staleness))
        """Versions, of every token trained on."""
        self.step_s = Histogram(STEP_BOUNDS_S)
        """From the end of one step to the end of the next."""
        self.checkpoint_s = Histogram(CHECKPOINT_BOUNDS_S)
        self.swap_s: dict[str, Histogram] = {}
        """transport -> seconds from the announcement until they are live at a generator"""
        self.stall_s: dict[str, Histogram] = {}
        """transport -> seconds without a decode step because of them"""
        self.nbytes = Counter[str]()
        """transport -> bytes of weights that became live, each generator's counted"""
        self.swap_failures = Counter[str]()
        self.evaluations = 0
        self.skipped = Counter[str]()
        """Why -> steps without a change of the weights."""
        self.generators_lost = 0
        self._wall_s: float | None = None

    def step(self, row: Row) -> None:
        """A step is done; its row of metrics.jsonl."""
        for lag, tokens in row["lag"]["tokens"].items():
            self.lag.add(float(lag), tokens)
        if self._wall_s is not None:
            self.step_s.add(row["wall_s"] - self._wall_s)
        self._wall_s = row["wall_s"]
        for why in ("nonfinite", "guarded"):
            self.skipped[why] += bool(row.get(f"skipped_{why}", 0.0))

    def weights_live(self, transport: str, seconds: float | None, stall_s: float, nbytes: int) -> None:
        """A generator took weights. seconds: None where it is not known when they were announced."""
        if seconds is not None:
            self.swap_s.setdefault(transport, Histogram(SWAP_BOUNDS_S)).add(seconds)
        self.stall_s.setdefault(transport, Histogram(SWAP_BOUNDS_S)).add(stall_s)
        self.nbytes[transport] += nbytes

    def checkpoint(self, seconds: float) -> None:
        if seconds > 0:
            self.checkpoint_s.add(seconds)


def lag_bounds(max_staleness: int) -> list[int]:
    """0, ... eta: at most MAX_LAG_BOUNDS + 1 of them, the last always eta.

    >>> lag_bounds(3), lag_bounds(40)
    ([0, 1, 2, 3], [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40])
    """
    size = -(-(max_staleness + 1) // MAX_LAG_BOUNDS)
    return sorted({0, *range(max_staleness, -1, -size)})


def mismatch_by_lag(row: Mapping[str, float], what: str) -> dict[int, float]:
    """lag -> tokens, abs (nats) or k3 of learner.mismatch."""
    found: dict[int, float] = {}
    for name, value in row.items():
        parts = name.split("_")
        if len(parts) == 4 and parts[:2] == ["mismatch", "lag"] and parts[3] == what and parts[2].isdigit():
            found[int(parts[2])] = value
    return found
