"""Which generator gets the weights how, and who is in the weight group. No sockets: it decides, the controller sends.

    shared_memory   it has the learner's /dev/shm (`auto`), or the recipe says that all have
    process_group   it is a member of the group
    http            the recipe says so, or it should be in the group and is not: it joined a moment ago, is silent,
                    did not come to a group, or the group failed too often

A member that is silent for a few heartbeats holds up every broadcast: a group without it is formed at once, long before
its leases are given to others. When it is heard again it fetches what it missed and becomes a member again, but for one
that failed to come REPEATS times: it stays with HTTP. What a broadcast that broke off did not bring is fetched, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from async_rl.controller.generators import Peer
from async_rl.wire.messages import Transport, WeightGroup, WeightsAnnounce, WeightsId

REPEATS = 3
"""Failures of one kind in a row: then it is left to HTTP, or left alone until the next version."""


class WeightRoutes:
    """One learner at a time: `learner` when it arrives."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._store = self._machine = ""
        self._epoch = 0
        self._members: set[str] = set()
        self._absent: dict[str, int] = {}
        """name -> how often it did not come to a group, since it came to one"""
        self._outside: set[str] = set()
        """Names of those that are to fetch the newest weights before they become members again."""
        self._lacking: dict[str, WeightsId] = {}
        """name -> weights whose broadcast broke off at this member"""
        self._nameless = 0
        """Groups in a row that failed, nobody knows by whose fault."""
        self._refused: dict[str, tuple[WeightsId, int]] = {}
        """name -> weights it could not take, and how often"""
        self._announced: dict[Transport, WeightsAnnounce] = {}

    def learner(self, store: str, machine: str) -> None:
        """A learner arrives; what the former one announced cannot be fetched any more."""
        self._store, self._machine = store, machine
        self._nameless = 0
        self._announced.clear()

    @property
    def grouped(self) -> bool:
        """Whether there can be a group at all."""
        return bool(self._store) and self._transport in ("auto", "process_group")

    def transport(self, peer: Peer) -> Transport:
        """How it gets what is announced now."""
        meant = self._meant(peer)
        return "http" if meant == "process_group" and peer.name not in self._members else meant

    def nbytes(self, transport: Transport) -> int:
        """Of what was announced last on it."""
        announce = self._announced.get(transport)
        return 0 if announce is None else announce.nbytes

    def announced(self, announce: WeightsAnnounce, peers: Iterable[Peer]) -> list[Peer]:
        """Whom to tell."""
        self._announced[announce.transport] = announce
        told = [peer for peer in peers if self.transport(peer) == announce.transport or self._lacks(peer, announce)]
        if announce.transport == "http":
            self._lacking.clear()
        return told

    def joined(self, peer: Peer) -> WeightsAnnounce | None:
        """What a generator that has just come fetches: a file, in any case. None where there is nothing yet."""
        self._absent.pop(peer.name, None)
        self._outside.discard(peer.name)
        self._refused.pop(peer.name, None)
        self._lacking.pop(peer.name, None)
        return self._file(peer)

    def regroup(self, peers: Iterable[Peer]) -> WeightGroup | None:
        """The members have changed: a group under a new epoch, or None where there is none and was none."""
        members = [peer.name for peer in peers if self._meant(peer) == "process_group" and self._may_join(peer)]
        if not self._store or not (members or self._members):
            return None
        self._members = set(members)
        self._epoch += 1
        return WeightGroup(self._epoch, members, self._store)

    def catch_up(self, peers: Iterable[Peer]) -> list[tuple[Peer, WeightsAnnounce]]:
        """What those fetch who are in no group, though they should, and hold older weights."""
        found = self._announced.get("http")
        if found is None:
            return []
        outside = [peer for peer in peers if self._meant(peer) == "process_group" and self.transport(peer) == "http"]
        return [(peer, found) for peer in outside if not peer.silent and _older(peer, found)]

    def silence(self, peer: Peer) -> None:
        """Its heartbeats are late, or back."""
        newest = self._announced.get("http")
        if peer.silent or (newest is not None and _older(peer, newest)):
            self._outside.add(peer.name)
        else:
            self._outside.discard(peer.name)

    def group_failed(self, missing: Iterable[str]) -> None:
        """The learner could not form a group, or not send to it."""
        named = list(missing)
        for name in named:
            self._absent[name] = self._absent.get(name, 0) + 1
            self._outside.add(name)
        self._nameless = 0 if named else self._nameless + 1

    def live(self, peer: Peer) -> bool:
        """It has taken weights. Returns whether it becomes a member again."""
        self._refused.pop(peer.name, None)
        self._lacking.pop(peer.name, None)
        if peer.name in self._members:
            self._absent.pop(peer.name, None)
            self._nameless = 0
        if peer.name not in self._outside or self._absent.get(peer.name, 0) >= REPEATS:
            return False
        self._outside.discard(peer.name)
        return self._may_join(peer)

    def failed(self, peer: Peer, weights: WeightsId) -> WeightsAnnounce | None:
        """It could not take these weights. What it fetches instead; None: it waits for newer ones."""
        found = self._file(peer)
        if found is None or found.weights < weights:
            if peer.name in self._members:
                self._lacking[peer.name] = weights
            return None
        before, times = self._refused.get(peer.name, (found.weights, 0))
        times = times + 1 if before == found.weights else 1
        self._refused[peer.name] = (found.weights, times)
        return found if times <= REPEATS else None

    def _meant(self, peer: Peer) -> Transport:
        if self._transport == "auto":
            return "shared_memory" if peer.machine == self._machine or not self._store else "process_group"
        return self._transport  # pyright: ignore[reportReturnType]

    def _may_join(self, peer: Peer) -> bool:
        given_up = self._nameless >= REPEATS
        return not (given_up or peer.silent or peer.name in self._outside)

    def _lacks(self, peer: Peer, announce: WeightsAnnounce) -> bool:
        lacking = self._lacking.get(peer.name)
        return announce.transport == "http" and lacking is not None and lacking <= announce.weights

    def _file(self, peer: Peer) -> WeightsAnnounce | None:
        return self._announced.get("shared_memory" if self._meant(peer) == "shared_memory" else "http")


def _older(peer: Peer, announce: WeightsAnnounce) -> bool:
    return peer.weights is None or peer.weights < announce.weights
