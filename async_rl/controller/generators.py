"""The generators as the controller sees them: who is there, what each holds, what waits for one of them.

queued --(credit)--> leased --(Finished | Failed)--> done
   ^                   |
   +---(generator dies)+

One of them can be the lane (controller.fast_lane): what is queued passes it by.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from async_rl.wire.messages import Activity, GroupLease, Lease, ToGenerator, WeightsId


@dataclass(slots=True)
class Peer:
    """One connected generator."""

    id: str
    """Of its connection."""
    name: str
    """Stable across restarts."""
    machine: str
    """Of its Hello."""
    heard: float
    """Loop time of its last frame."""
    credit: int = 0
    """Rollouts it accepts in all since its Hello."""
    leased: int = 0
    """Rollouts it was given in all since its Hello."""
    leases: dict[int, GroupLease] = field(default_factory=dict[int, GroupLease])
    """group id -> what it still works on"""
    since: dict[int, float] = field(default_factory=dict[int, float])
    """group id -> loop time of its lease"""
    held: int = 0
    """Rollouts in `leases`."""

    @property
    def free(self) -> int:
        """Rollouts it accepts now."""
        return self.credit - self.leased

    silent: bool = False
    """Its heartbeats are late, but not yet so late that it is gone."""
    weights: WeightsId | None = None
    counted: WeightsId | None = None
    """The weights of its last Positions: what its rollouts sampled since then, until the next Positions, is theirs."""
    activity: Activity | None = None


class Generators:
    """Leases queue in order of admission, evaluation first; a generator with credit takes the head of the queue.

    Args:
        send: puts a message on the rollout stream.
        gone: called with the name of a generator whose heartbeats stopped.
        again: what is leased instead of a lease whose generator is gone; None: nothing.
        silence: called when a generator's heartbeats are `silent_s` late (`peer.silent`), and when they are back.
    """

    def __init__(
        self,
        send: Callable[[str, ToGenerator], None],
        gone: Callable[[str], None],
        again: Callable[[GroupLease], GroupLease | None],
        *,
        timeout_s: float,
        silent_s: float,
        silence: Callable[[Peer], None],
    ) -> None:
        self._silent_s, self._silence = min(silent_s, timeout_s), silence
        self.peers: dict[str, Peer] = {}
        """connection id -> generator"""
        self._send, self._gone, self._again, self._timeout_s = send, gone, again, timeout_s
        self._queue: list[GroupLease] = []
        self._freest: list[tuple[int, str]] = []
        """Heap of (-free, connection id); entries that are out of date are skipped."""
        self._room = 0
        """Rollouts that all of them together accept at a time, those they hold included."""
        self.lane: Peer | None = None
        """Takes what it is given by `to_lane` and nothing else."""
        self._lane_size = 0
        self._watch: dict[str, asyncio.TimerHandle] = {}

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def room(self) -> int:
        """Rollouts that all of them together accept at a time, those they hold included; in the lane, its size."""
        lane = self.lane
        return self._room if lane is None else self._room - lane.free - lane.held + self._lane_size

    @property
    def counted(self) -> int:
        """The version since which a generator has not said what its rollouts sampled."""
        return min((peer.counted.version for peer in self.peers.values() if peer.counted is not None), default=0)

    def gauges(self) -> dict[str, float]:
        """Of their engines, added up; of shares (`_used`) the largest."""
        total: dict[str, float] = {}
        for peer in self.peers.values():
            for name, value in (peer.activity.gauges if peer.activity is not None else {}).items():
                before = total.get(name, 0)
                total[name] = max(before, value) if name.endswith("_used") else before + value
        return total

    def holder(self, group_id: int, member: int) -> Peer | None:
        """Who works on a rollout."""
        for peer in self.peers.values():
            lease = peer.leases.get(group_id)
            if lease is not None and member in lease.members:
                return peer
        return None

    def hello(self, peer_id: str, name: str, machine: str = "") -> Peer:
        """A generator arrives. An older connection of the same name is void."""
        for old in [peer for peer in self.peers.values() if peer.name == name]:
            self.remove(old)
        peer = self.peers[peer_id] = Peer(peer_id, name, machine, asyncio.get_running_loop().time())
        self._arm(peer)
        return peer

    def accept(self, peer: Peer, credit: int) -> None:
        """It accepts so many rollouts in all since its Hello."""
        if credit > peer.credit:
            self._room += credit - peer.credit
            peer.credit = credit
            heapq.heappush(self._freest, (-peer.free, peer.id))

    def heard(self, peer: Peer) -> None:
        peer.heard = asyncio.get_running_loop().time()
        if peer.silent:
            peer.silent = False
            self._silence(peer)
            self._watch[peer.id].cancel()
            self._arm(peer)

    def remove(self, peer: Peer) -> None:
        """It is gone: what it held is leased again, before anything younger."""
        del self.peers[peer.id]
        self._room -= peer.free + peer.held
        if peer is self.lane:
            self.lane = None
        self._watch.pop(peer.id).cancel()
        again = [self._again(lease) for lease in peer.leases.values()]
        self.enqueue(lease for lease in again if lease is not None)

    def enqueue(self, leases: Iterable[GroupLease]) -> None:
        """Evaluation first, then by age."""
        self._queue += leases
        self._queue.sort(key=lambda lease: (lease.purpose == "train", lease.group_id))

    def dispatch(self) -> None:
        """Give out what the credit allows, in order: the head of the queue is never passed by a smaller group."""
        given: dict[str, list[GroupLease]] = {}
        while self._queue and self.peers:
            size = len(self._queue[0].members)
            peer = self._most_free()
            if peer is None or peer.free < size:
                break
            lease = self._queue.pop(0)
            self._hold(peer, lease)
            given.setdefault(peer.id, []).append(lease)
        for peer_id, leases in given.items():
            self._send(peer_id, Lease(leases))

    def keep_lane(self, size: int) -> None:
        """The generator that holds least takes no more from the queue, but up to `size` rollouts by `to_lane`; 0 =
        none does."""
        self._lane_size = size
        if size and self.lane is None:
            self.lane = min(self.peers.values(), key=lambda peer: (peer.held, peer.name), default=None)
        elif not size and self.lane is not None:
            heapq.heappush(self._freest, (-self.lane.free, self.lane.id))
            self.lane = None

    def to_lane(self, lease: GroupLease) -> bool:
        """Lease it to the lane, if that is there and has credit."""
        lane = self.lane
        if lane is None or lane.free < len(lease.members):
            return False
        self._hold(lane, lease)
        self._send(lane.id, Lease([lease]))
        return True

    def _hold(self, peer: Peer, lease: GroupLease) -> None:
        """From now on it works on these."""
        peer.leased += len(lease.members)
        peer.held += len(lease.members)
        heapq.heappush(self._freest, (-peer.free, peer.id))
        held = peer.leases.setdefault(lease.group_id, msgspec.structs.replace(lease, members=[], segments=[]))
        held.members.extend(lease.members)
        peer.since.setdefault(lease.group_id, asyncio.get_running_loop().time())

    def _most_free(self) -> Peer | None:
        while self._freest:
            free, peer_id = self._freest[0]
            peer = self.peers.get(peer_id)
            if peer is not None and peer is not self.lane and peer.free == -free:
                return peer
            heapq.heappop(self._freest)
        return None

    def ended(self, peer: Peer, group_id: int, members: Iterable[int]) -> None:
        """These members need no generator any more."""
        lease = peer.leases.get(group_id)
        if lease is None:
            return
        for member in members:
            if member in lease.members:
                lease.members.remove(member)
                peer.held -= 1
                self._room -= 1  # its next Credit returns it
        if not lease.members:
            del peer.leases[group_id], peer.since[group_id]

    def forget(self, group_id: int, members: Iterable[int]) -> None:
        """Nobody is to begin these members any more."""
        gone = set(members)
        for lease in [lease for lease in self._queue if lease.group_id == group_id]:
            lease.members[:] = [member for member in lease.members if member not in gone]
        self._queue = [lease for lease in self._queue if lease.members]

    def broadcast(self, message: ToGenerator) -> None:
        for peer_id in self.peers:
            self._send(peer_id, message)

    def close(self) -> None:
        for timer in self._watch.values():
            timer.cancel()

    def _arm(self, peer: Peer) -> None:
        due = self._due(peer)
        self._watch[peer.id] = asyncio.get_running_loop().call_at(due, self._late, peer, due)

    def _due(self, peer: Peer) -> float:
        return peer.heard + (self._timeout_s if peer.silent else self._silent_s)

    def _late(self, peer: Peer, due: float) -> None:
        """The clock is not asked: a loop may call a hair early, and a timer for the same moment would never end."""
        if self._due(peer) > due:  # heard in between
            self._arm(peer)
        elif peer.silent or self._silent_s >= self._timeout_s:
            self.remove(peer)
            self._gone(peer.name)
        else:
            peer.silent = True
            self._silence(peer)
            self._arm(peer)
