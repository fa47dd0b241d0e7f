"""Weights on their way from the learner to every generator: announced, grouped, tried again until they are live.

What takes which way is decided by weight_routes.py; here are the messages and the pauses between two tries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from async_rl.controller.backoff import Backoff
from async_rl.controller.generators import Generators, Peer
from async_rl.controller.weight_routes import WeightRoutes
from async_rl.telemetry.totals import Totals
from async_rl.wire.messages import ToGenerator, ToLearner, WeightsAnnounce, WeightsId

SLOW_RETRY_S = 1.0
"""From this pause between two tries on, it is said that weights do not arrive."""
GROUP = "the weight group"

log = logging.getLogger(__name__)


class WeightDelivery:
    """One learner at a time: `learner` when it arrives, `regroup` once it may be sent something.

    Args:
        to_generator, to_learner: put a message on a stream. `to_learner` drops it while there is no learner.
        say: gets one line for the user.
        totals: is told of what became live, and of what did not.
        clock: seconds.
    """

    def __init__(
        self,
        transport: str,
        generators: Generators,
        *,
        to_generator: Callable[[str, ToGenerator], None],
        to_learner: Callable[[ToLearner], None],
        say: Callable[[str], None],
        totals: Totals,
        clock: Callable[[], float],
    ) -> None:
        self._totals, self._clock = totals, clock
        self._announced_at: dict[tuple[str, WeightsId], float] = {}
        """(transport, weights) -> when; the newest of each transport."""
        self._routes = WeightRoutes(transport)
        self._retries = Backoff()
        """By generator, or by GROUP."""
        self._generators, self._say = generators, say
        self._to_generator, self._to_learner = to_generator, to_learner
        self._learner_here = False
        self.live_updates = 0
        """WeightsLive of all generators."""
        self.changed: float | None = None
        """Share of the elements in which the newest weights differ from those before, where it was measured."""

    def learner(self, store: str, machine: str) -> None:
        """A learner has come (weights_store and machine of its Hello); it is not sent anything before `regroup`."""
        self._routes.learner(store, machine)
        self._learner_here = False

    def learner_ready(self) -> None:
        """It was welcomed: its first group can be formed."""
        self._learner_here = True
        self.regroup()

    def joined(self, peer: Peer) -> None:
        """A generator was welcomed: it fetches what there is."""
        first = self._routes.joined(peer)
        if first is not None:
            self._to_generator(peer.id, first)
        self.regroup()

    def regroup(self) -> None:
        """The members changed: a new weight group under a new epoch. Who is in none fetches what it lacks."""
        group = self._routes.regroup(self._generators.peers.values()) if self._learner_here else None
        if group is None:
            return
        self._to_learner(group)
        self._generators.broadcast(group)
        for peer, announce in self._routes.catch_up(self._generators.peers.values()):
            self._to_generator(peer.id, announce)

    def silence(self, peer: Peer) -> None:
        """A generator's heartbeats are late, or back."""
        if self._routes.grouped:
            log.warning("%s is %s", peer.name, "silent" if peer.silent else "heard again")
            self._routes.silence(peer)
            self.regroup()

    def announced(self, announce: WeightsAnnounce) -> None:
        """The learner has new weights, or they can now be had in one more way."""
        if announce.changed is not None:
            self.changed = announce.changed
        for known in [known for known in self._announced_at if known[0] == announce.transport]:
            if known[1] < announce.weights:  # who takes the former ones now is timed from the newest
                del self._announced_at[known]
        self._announced_at.setdefault((announce.transport, announce.weights), self._clock())
        for peer in self._routes.announced(announce, self._generators.peers.values()):
            self._to_generator(peer.id, announce)

    def live(self, peer: Peer, weights: WeightsId, stall_s: float = 0.0) -> None:
        """A generator samples from these from now on."""
        peer.weights = weights
        self._count(peer, weights, stall_s)
        self.live_updates += 1
        self._retries.worked(peer.name)
        if all(one.weights == weights for one in self._generators.peers.values()):
            self._retries.worked(GROUP)
        if self._routes.live(peer):
            self.regroup()

    def failed(self, peer: Peer, weights: WeightsId, reason: str) -> None:
        """They did not reach this generator."""
        log.warning("weights %d did not reach %s: %s", weights.version, peer.name, reason)
        self._totals.swap_failures[self._routes.transport(peer)] += 1
        problem = f"weights {weights.version} do not reach {peer.name}: {reason}"
        again = self._routes.failed(peer, weights)
        if again is not None:
            self._try_again(peer.name, lambda: self._announce_again(peer, again), problem)
        if self._routes.transport(peer) == "process_group":  # it has left the group
            self._try_again(GROUP, self.regroup, problem)

    def group_failed(self, weights: WeightsId, reason: str, missing: Sequence[str]) -> None:
        """The learner could not form a group, or not send to it."""
        log.warning("weights %d were not published: %s", weights.version, reason)
        self._routes.group_failed(missing)
        self._try_again(GROUP, self.regroup, f"weights {weights.version} were not published: {reason}")

    def _count(self, peer: Peer, weights: WeightsId, stall_s: float) -> None:
        transport = self._routes.transport(peer)
        at = self._announced_at.get((transport, weights))
        nbytes = self._routes.nbytes(transport)
        self._totals.weights_live(transport, None if at is None else self._clock() - at, stall_s, nbytes)

    def close(self) -> None:
        """Nothing is tried any more."""
        self._retries.close()

    def _try_again(self, what: str, again: Callable[[], None], problem: str) -> None:
        """After a pause that grows with every failure; once it can be noticed, it is said."""
        pause_s = self._retries.failed(what, again)
        if pause_s is not None and pause_s >= SLOW_RETRY_S:
            self._say(f"{problem} (next try in {pause_s:.0f} s)")

    def _announce_again(self, peer: Peer, announce: WeightsAnnounce) -> None:
        here = self._generators.peers.get(peer.id) is peer
        if here and (peer.weights is None or peer.weights < announce.weights):
            self._to_generator(peer.id, announce)
