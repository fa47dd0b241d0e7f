"""The fast lane: one generator that runs few rollouts, for those that the next two steps wait for.

Where nothing may be masked, a step waits until the last rollout with a token of its version - eta has ended. An engine
decodes faster the fewer it runs, so these rollouts move to one that runs hardly anything else:

    steps have to wait      --> the generator that holds least takes no new groups any more: it is the lane
    the lane has a place    --> Yield to whoever has the longest of those rollouts
    its Segment(yielded)    --> a Lease to the lane, which computes its cache again and goes on
    steps no longer wait    --> it takes new groups like the others

Which rollouts: docs/decisions/2026-11-21-staleness-frontier.md, section 9. Synchronous runs have no lane.
"""

from __future__ import annotations

from collections.abc import Callable

from async_rl.controller.composer import Composer
from async_rl.controller.generators import Generators, Peer
from async_rl.staleness.account import Rollout
from async_rl.wire.messages import GroupLease, ToGenerator, Yield

LEAST_GENERATORS = 4
"""Of fewer, one is too large a share to keep it nearly empty."""


class FastLane:
    """Call `advance` after every event, `changed` when other rollouts may be the ones that are waited for."""

    def __init__(self, generators: Generators, composer: Composer, send: Callable[[str, ToGenerator], None]) -> None:
        self._generators, self._composer, self._send = generators, composer, send
        self._asked: set[Rollout] = set()
        """On their way to the lane."""
        self._candidates: list[Rollout] | None = None
        """Those that are waited for, the first to move last; None: not known yet."""

    @property
    def peer(self) -> Peer | None:
        return self._generators.lane

    def changed(self, *, composed: bool = False) -> None:
        """Positions are known, or a step was composed: whoever did not answer until then is not waited for."""
        self._candidates = None
        if composed:
            self._asked.clear()

    def gone(self, rollout: Rollout) -> None:
        """It ended, or its generator did."""
        self._asked.discard(rollout)

    def advance(self) -> None:
        size = self._composer.lane_size if len(self._generators.peers) >= LEAST_GENERATORS else 0
        self._generators.keep_lane(size)
        lane = self.peer
        while lane is not None and lane.held + len(self._asked) < size:
            rollout = self._next(lane)
            if rollout is None:
                return
            self._asked.add(rollout)

    def takes(self, lease: GroupLease) -> bool:
        """Whether a rollout that was handed back goes on in the lane: it was asked for, and there is a place."""
        asked = {(lease.group_id, member) for member in lease.members} & self._asked
        self._asked -= asked
        return bool(asked) and self._generators.to_lane(lease)

    def _next(self, lane: Peer) -> Rollout | None:
        """Ask for the next one that is not in the lane."""
        if self._candidates is None:
            self._candidates = [one for one in reversed(self._composer.waited_for()) if one not in self._asked]
        while self._candidates:
            group_id, member = self._candidates.pop()
            holder = self._generators.holder(group_id, member)
            if holder is not None and holder is not lane:
                self._send(holder.id, Yield(group_id, [member]))
                return group_id, member
        return None
