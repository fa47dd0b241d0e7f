"""The generators as the controller sees them: who is there, what each holds, what waits for one of them.

queued --(credit)--> leased --(Finished | Failed)--> done
   ^                   |
   +---(generator dies)+
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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
    weights: WeightsId | None = None
    activity: Activity | None = None


class Generators:
    """Leases queue in order of admission, evaluation first; a generator with credit takes the head of the queue.

    Args:
        send: puts a message on the rollout stream.
        gone: called with the name of a generator whose heartbeats stopped.
    """

    def __init__(
        self,
        send: Callable[[str, ToGenerator], None],
        gone: Callable[[str], None],
        *,
        timeout_s: float,
    ) -> None:
        self.peers: dict[str, Peer] = {}
        """connection id -> generator"""
        self._send, self._gone, self._timeout_s = send, gone, timeout_s
        self._queue: list[GroupLease] = []
        self._watch: dict[str, asyncio.TimerHandle] = {}

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def holder(self, group_id: int) -> str:
        """Who works on a group, for messages to people."""
        held = [peer.name for peer in self.peers.values() if group_id in peer.leases]
        return held[0] if held else "nobody"

    def hello(self, peer_id: str, name: str) -> Peer:
        """A generator arrives. An older connection of the same name is void."""
        for old in [peer for peer in self.peers.values() if peer.name == name]:
            self.remove(old)
        peer = self.peers[peer_id] = Peer(peer_id, name, asyncio.get_running_loop().time())
        self._arm(peer)
        return peer

    def heard(self, peer: Peer) -> None:
        peer.heard = asyncio.get_running_loop().time()

    def remove(self, peer: Peer) -> None:
        """It is gone: what it held is leased again, before anything younger."""
        del self.peers[peer.id]
        self._watch.pop(peer.id).cancel()
        self.enqueue(peer.leases.values())

    def enqueue(self, leases: Iterable[GroupLease]) -> None:
        """Evaluation first, then by age."""
        self._queue += leases
        self._queue.sort(key=lambda lease: (lease.purpose == "train", lease.group_id))

    def dispatch(self) -> None:
        """Give out what the credit allows, in order: the head of the queue is never passed by a smaller group."""
        given: dict[str, list[GroupLease]] = {}
        while self._queue and self.peers:
            size = len(self._queue[0].members)
            peer = max(self.peers.values(), key=lambda peer: peer.credit - peer.leased)
            if peer.leased + size > peer.credit:
                break
            lease = self._queue.pop(0)
            peer.leased += size
            peer.leases[lease.group_id] = lease
            given.setdefault(peer.id, []).append(lease)
        for peer_id, leases in given.items():
            self._send(peer_id, Lease(leases))

    def ended(self, peer: Peer, group_id: int, members: Iterable[int]) -> None:
        """These members need no generator any more."""
        lease = peer.leases.get(group_id)
        if lease is None:
            return
        for member in members:
            if member in lease.members:
                lease.members.remove(member)
        if not lease.members:
            del peer.leases[group_id]

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
