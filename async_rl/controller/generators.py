"""The generators as the controller sees them: who is there, what each holds, what waits for one of them.

queued --(credit)--> leased --(Finished | Failed)--> done
   ^                   |
   +---(generator dies)+
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
    heard: float
    """Loop time of its last frame."""
    credit: int = 0
    """Rollouts it accepts in all since its Hello."""
    leased: int = 0
    """Rollouts it was given in all since its Hello."""
    leases: dict[int, GroupLease] = field(default_factory=dict[int, GroupLease])
    """group id -> what it still works on"""
    held: int = 0
    """Rollouts in `leases`."""

    @property
    def free(self) -> int:
        """Rollouts it accepts now."""
        return self.credit - self.leased

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
    """

    def __init__(
        self,
        send: Callable[[str, ToGenerator], None],
        gone: Callable[[str], None],
        again: Callable[[GroupLease], GroupLease | None],
        *,
        timeout_s: float,
    ) -> None:
        self.peers: dict[str, Peer] = {}
        """connection id -> generator"""
        self._send, self._gone, self._again, self._timeout_s = send, gone, again, timeout_s
        self._queue: list[GroupLease] = []
        self._freest: list[tuple[int, str]] = []
        """Heap of (-free, connection id); entries that are out of date are skipped."""
        self.room = 0
        """Rollouts that all of them together accept at a time, those they hold included."""
        self._watch: dict[str, asyncio.TimerHandle] = {}

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def holder(self, group_id: int, member: int) -> Peer | None:
        """Who works on a rollout."""
        for peer in self.peers.values():
            lease = peer.leases.get(group_id)
            if lease is not None and member in lease.members:
                return peer
        return None

    def hello(self, peer_id: str, name: str) -> Peer:
        """A generator arrives. An older connection of the same name is void."""
        for old in [peer for peer in self.peers.values() if peer.name == name]:
            self.remove(old)
        peer = self.peers[peer_id] = Peer(peer_id, name, asyncio.get_running_loop().time())
        self._arm(peer)
        return peer

    def accept(self, peer: Peer, credit: int) -> None:
        """It accepts so many rollouts in all since its Hello."""
        if credit > peer.credit:
            self.room += credit - peer.credit
            peer.credit = credit
            heapq.heappush(self._freest, (-peer.free, peer.id))

    def heard(self, peer: Peer) -> None:
        peer.heard = asyncio.get_running_loop().time()

    def remove(self, peer: Peer) -> None:
        """It is gone: what it held is leased again, before anything younger."""
        del self.peers[peer.id]
        self.room -= peer.free + peer.held
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
            peer.leased += size
            peer.held += size
            heapq.heappush(self._freest, (-peer.free, peer.id))
            held = peer.leases.setdefault(lease.group_id, msgspec.structs.replace(lease, members=[], segments=[]))
            held.members.extend(lease.members)
            given.setdefault(peer.id, []).append(lease)
        for peer_id, leases in given.items():
            self._send(peer_id, Lease(leases))

    def _most_free(self) -> Peer | None:
        while self._freest:
            free, peer_id = self._freest[0]
            peer = self.peers.get(peer_id)
            if peer is not None and peer.free == -free:
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
                self.room -= 1  # its next Credit returns it
        if not lease.members:
            del peer.leases[group_id]

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
        loop = asyncio.get_running_loop()
        self._watch[peer.id] = loop.call_at(peer.heard + self._timeout_s, self._expire, peer)

    def _expire(self, peer: Peer) -> None:
        if peer.heard + self._timeout_s > asyncio.get_running_loop().time():
            self._arm(peer)
            return
        self.remove(peer)
        self._gone(peer.name)
