"""Learner and generator in turns on one device: what moves the table of controller.turns, and what each state is told.

    UPDATE    the generator is told to take the device as soon as the learner's newest weights are announced
    ROLLOUT   nothing: rollouts end, until a batch is composed (an evaluation in progress is finished first)
    RELEASE   the generator is told to leave
    ONLOAD    the learner is told to take the device
    TRAIN     the learner gets the batch, and the next ones as long as they can be composed without further rollouts
    OFFLOAD   the learner is told to leave

A state in which the device changes hands has a deadline, long enough to start a process again; ROLLOUT and TRAIN take
as long as they take, and the watchdog names what is pending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from async_rl.controller.turns import FIRST, Event, Turn, follow
from async_rl.telemetry.journal import Row
from async_rl.wire.messages import DeviceHeld, DeviceTurn, MicroBatches

TURN_TIMEOUT_S = 300.0
ANSWERS = {
    (Turn.UPDATE, "generator", True): Event.GENERATOR_ON,
    (Turn.RELEASE, "generator", False): Event.GENERATOR_OFF,
    (Turn.ONLOAD, "learner", True): Event.LEARNER_ON,
    (Turn.OFFLOAD, "learner", False): Event.LEARNER_OFF,
}
WAITS_FOR = {
    Turn.UPDATE: "the generator to sample with the weights of version {version}",
    Turn.RELEASE: "the generator to free the device",
    Turn.ONLOAD: "the learner to be on the device",
    Turn.OFFLOAD: "the learner to free the device",
}


class Colocation:
    """One per controller of a colocated run.

    Args:
        to_generator, to_learner: send to the one that is there; what is sent to nobody is lost.
        version: that the learner is at.
        generator_there: whether one has said Hello, and is not silent since.
        server_s: how long a server that the generator starts may take, on top.
    """

    def __init__(
        self,
        *,
        to_generator: Callable[[DeviceTurn], None],
        to_learner: Callable[[DeviceTurn | MicroBatches], None],
        version: Callable[[], int],
        generator_there: Callable[[], bool],
        server_s: float = 0.0,
    ) -> None:
        self._timeout_s = TURN_TIMEOUT_S + server_s
        self.turn = FIRST
        self._to_generator, self._to_learner = to_generator, to_learner
        self._version, self._generator_there = version, generator_there
        self._loop = asyncio.get_running_loop()
        self._announced: int | None = None
        """Newest version of this learner process that can be fetched."""
        self._number = 0
        self._awaited: int | None = None
        """The number of the order that is not answered yet."""
        self._at_learner = 0
        """Batches that are composed and not trained on, as far as this learner process has to do with them."""
        self._batches: list[MicroBatches] = []
        """Committed; they are sent when it is the learner's turn."""
        self._entered = self._since = self._loop.time()
        self._seconds: dict[str, float] = {}
        """By state, since the last `take_row`."""
        self._nbytes: dict[str, int] = {}
        self._overdue: asyncio.Future[None] = self._loop.create_future()
        self._deadline: asyncio.TimerHandle | None = None
        self._arm()

    async def watch(self) -> None:
        """Raises TimeoutError, naming whom it waits for, when the device does not change hands in time."""
        await self._overdue

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    @property
    def may_compose(self) -> bool:
        return self.turn in (Turn.ROLLOUT, Turn.TRAIN)

    @property
    def said(self) -> str:
        """For people."""
        return f"the device is the {self.turn.holder}'s ({self.turn.value}, {self._loop.time() - self._entered:.0f} s)"

    def take_row(self) -> Row:
        """Seconds by state since this was asked last, and bytes of the device that each process held when it answered
        last, on it and off it."""
        self._settle_seconds()
        seconds, self._seconds = self._seconds, {}
        return {"seconds": seconds, "bytes": dict(self._nbytes)}

    # --- what happened ----------------------------------------------------------------------------------------

    def generator_came(self) -> None:
        """A new process, after its HelloAck and the newest announcement."""
        self._follow(Event.GENERATOR_NEW)

    def learner_came(self) -> None:
        """A new process, after its HelloAck. What was composed for the former one is asked for again."""
        self._at_learner, self._announced = 0, None
        self._batches.clear()
        self._follow(Event.LEARNER_NEW)

    def weights_announced(self, version: int) -> None:
        """The generator has been told, if it is there."""
        self._announced = version
        if self.turn is Turn.UPDATE and self._awaited is None:
            self._tell()

    def composed(self) -> None:
        self._at_learner += 1
        if self.turn is Turn.ROLLOUT:
            self._follow(Event.COMPOSED)

    def committed(self, batch: MicroBatches) -> None:
        """The composition is on disk: the learner may have the batch."""
        self._batches.append(batch)
        self._send_batches()

    def step_done(self) -> None:
        self._at_learner = max(0, self._at_learner - 1)

    def composed_all(self) -> None:
        """Nothing more can be composed now."""
        if self.turn is Turn.TRAIN and self._at_learner == 0:
            self._follow(Event.NO_BATCH)

    def answered(self, role: str, answer: DeviceHeld) -> None:
        """An answer to an order that does not stand any more is ignored."""
        if answer.number != self._awaited:
            return
        self._nbytes[f"{role}_{'on' if answer.held else 'off'}"] = answer.nbytes
        event = ANSWERS.get((self.turn, role, answer.held))
        if event is not None:
            self._follow(event)

    # --- what follows -----------------------------------------------------------------------------------------

    def _follow(self, event: Event) -> None:
        after = follow(self.turn, event)
        told_anew = after is Turn.UPDATE and event is Event.GENERATOR_NEW  # the former process had the order
        if after is self.turn and not told_anew:
            return
        self._settle_seconds()
        self._entered = self._since
        self.turn, self._awaited = after, None
        self._arm()
        self._tell()

    def _tell(self) -> None:
        match self.turn:
            case Turn.UPDATE:
                if self._announced == self._version() and self._generator_there():
                    self._to_generator(self._order(True))
            case Turn.RELEASE:
                self._to_generator(self._order(False))
            case Turn.ONLOAD:
                self._to_learner(self._order(True))
            case Turn.OFFLOAD:
                self._to_learner(self._order(False))
            case Turn.TRAIN:
                self._send_batches()
            case Turn.ROLLOUT:
                pass

    def _order(self, hold: bool) -> DeviceTurn:
        self._number += 1
        self._awaited = self._number
        return DeviceTurn(self._number, hold)

    def _send_batches(self) -> None:
        if self.turn is Turn.TRAIN:
            batches, self._batches = self._batches, []
            for batch in batches:
                self._to_learner(batch)

    def _settle_seconds(self) -> None:
        now = self._loop.time()
        self._seconds[self.turn.value] = self._seconds.get(self.turn.value, 0.0) + now - self._since
        self._since = now

    def _arm(self) -> None:
        self.close()
        if self.turn in WAITS_FOR:
            self._deadline = self._loop.call_later(self._timeout_s, self._expire)

    def _expire(self) -> None:
        if not self._overdue.done():
            whom = WAITS_FOR[self.turn].format(version=self._version())
            self._overdue.set_exception(
                TimeoutError(f"turn {self.turn.value}: waited {self._timeout_s:.0f} s for {whom}")
            )
