"""How far every request was when its server stood still for new weights."""

from __future__ import annotations

from collections.abc import Callable

from async_rl.engines.sglang.calls import Calls
from async_rl.engines.sglang.worker import Worker


class Moment:
    """Of one update or release. Servers stand still one after the other."""

    def __init__(self, calls: Calls, delivered: Callable[[], int]) -> None:
        """delivered: how many chunks were, so far."""
        self._calls, self._count = calls, delivered
        self._sampled: dict[int, int] = {}
        self._delivered: int | None = None

    @property
    def sampled(self) -> dict[int, int]:
        """request id -> tokens; as of now where no server was at work."""
        return self._sampled or self._calls.all_sampled()

    @property
    def delivered(self) -> int:
        return self._count() if self._delivered is None else self._delivered

    def note(self, worker: Worker) -> None:
        """What the others have by now may grow until their own moment."""
        ours, others = self._calls.sampled(worker)
        self._sampled |= ours
        for request_id, tokens in others.items():
            self._sampled.setdefault(request_id, tokens)
        if self._delivered is None:
            self._delivered = self._count()
