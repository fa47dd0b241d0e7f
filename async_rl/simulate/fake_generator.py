"""A generator without an engine or episodes: the other end of the rollout stream, in a few microseconds a rollout.

A decode step of n sequences takes step_s + sequence_s * n and gives each of them one token. All rows advance together,
so an engine is one clock, which counts the tokens every row has been given, and one heap of the clock values at which
something happens: one timer, whatever runs.

At a weight update the clock stands still for `pause_s`; the version goes live at the end of it and the cache is kept,
so a rollout's early tokens are old and its late ones fresh. A rollout that comes from another generator has no cache
here: the clock stands still while all its tokens are computed again.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from async_rl.errors import ProtocolError
from async_rl.rollout.worker import RESEND_AFTER_S
from async_rl.simulate.records import GeneratorTrace, RolloutLog
from async_rl.simulate.workload import GroupDraw
from async_rl.telemetry.activity import Tracker
from async_rl.wire.messages import (
    Ack,
    Activity,
    Cancel,
    Credit,
    DeviceHeld,
    DeviceTurn,
    Finished,
    FinishReason,
    GeneratorMessage,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    Lease,
    Positions,
    RolloutResult,
    Segment,
    Sequence,
    Shutdown,
    ToGenerator,
    VersionSpan,
    WeightGroup,
    WeightsAnnounce,
    WeightsId,
    WeightsLive,
    Yield,
)
from async_rl.wire.transport import Client

TOKEN_BYTES = 4
ROUNDING = 1e-6
"""Tokens by which the clock may miss a due moment, because times are floats."""


@dataclass(frozen=True)
class EngineModel:
    """Of one engine, in wire tokens and virtual seconds."""

    slots: int
    """Sequences it decodes at the same time; leases beyond them wait inside the generator."""
    step_s: float
    """Seconds of a decode step, apart from its sequences."""
    sequence_s: float
    """Seconds that each sequence adds."""
    pause_s: float = 0.0
    """Seconds that it stands still at a weight update."""
    prefill_s: float = 0.0
    """Seconds that it stands still for each token that was sampled elsewhere, when a lease goes on here."""
    grain_s: float = 0.0
    """It looks at what ended at multiples of this only, so that several engines wake together: a coarser grain is
    faster to simulate, and leaves slots empty for half of it; 0 = at once."""


class Row:
    """One rollout that this generator holds."""

    __slots__ = (
        "gone",
        "group_id",
        "lease",
        "limit",
        "member",
        "past",
        "reason",
        "sent",
        "since",
        "start",
        "swap",
        "total",
    )

    def __init__(self, lease: GroupLease, member: int, total: int, reason: FinishReason) -> None:
        self.lease, self.group_id, self.member = lease, lease.group_id, member
        self.reason: FinishReason = reason
        self.total = total
        """Tokens it will have at its end, over all leases."""
        self.past: list[VersionSpan] = []
        """Of what earlier leases sampled, and of what was sent as segments."""
        self.start = self.sent = 0
        """Tokens it had when this lease began; tokens that earlier leases or sent segments hold."""
        self.limit = 0
        """Tokens at which the lease ends."""
        self.since = 0.0
        """The clock when its sampling began here."""
        self.swap = -1
        """The newest weight update before that."""
        self.gone = False
        """Cancelled: what the heap still holds of it means nothing."""


class Swap(NamedTuple):
    clock: float
    weights: WeightsId
    recomputed: bool
    """The engine came back to its device: the KV cache is all of these weights."""


class FakeGenerator:
    """`await run()` until the controller says Shutdown.

    Args:
        credit: rollouts it holds at most, running or waiting for a slot.
        beat_s: seconds of silence before a heartbeat; default: what the controller asks for.
        draw: lengths and rewards of a group's members.
        log: what all generators of a simulation write down.
        share: of an engine that shares its device: called with True when it begins to take it, False when it has left.
        turn_s: seconds that leaving the device takes.
    """

    def __init__(
        self,
        *,
        name: str,
        transport: Client[GeneratorMessage, ToGenerator],
        model: EngineModel,
        credit: int,
        draw: Callable[[int], GroupDraw],
        beat_s: float | None = None,
        log: RolloutLog | None = None,
        share: Callable[[bool], None] | None = None,
        turn_s: float = 0.0,
    ) -> None:
        self.name, self.trace = name, GeneratorTrace()
        self.shutdown: Shutdown | None = None
        self._transport, self._model, self._credit, self._draw = transport, model, credit, draw
        self._log = RolloutLog() if log is None else log
        self._loop = asyncio.get_running_loop()
        self.tracker = Tracker("wait_lease", clock=self._loop.time)
        self._rows: dict[tuple[int, int], Row] = {}
        """In slots."""
        self._waiting: dict[tuple[int, int], Row] = {}
        """For a slot."""
        self._held: list[GroupLease] = []
        """For newer weights."""
        self._due: list[tuple[float, int, Row]] = []
        """A heap of (clock, number, row); what belongs to rows that are gone is skipped."""
        self._numbers = 0
        self._clock = 0.0
        """Tokens each row has been given since the engine began."""
        self._at = 0.0
        """Loop time to which the clock is brought forward."""
        self._token_s = model.step_s
        self._swaps: list[Swap] = []
        self._loading: WeightsId | None = None
        """The weights for which the engine stands still."""
        self._prefill_s = 0.0
        """How long it has to stand still yet to compute what came from elsewhere."""
        self._newest: WeightsId | None = None
        self._share, self._turn_s, self._on_device = share, turn_s, share is None
        self._turn: DeviceTurn | None = None
        """The order to take or leave the device that is not carried out yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._others: dict[str, asyncio.TimerHandle] = {}
        """Heartbeat and weight update."""
        self._ended = 0
        """Rollouts that no longer use credit, and as many as were told."""
        self._told = 0
        self._sampled = 0.0
        self._heartbeat_s = beat_s
        self._spoke = 0.0
        """Loop time of the newest message."""
        self._unacked: dict[tuple[int, int], tuple[float, Finished]] = {}
        self._serving: asyncio.Task[None] | None = None

    async def run(self) -> Shutdown | None:
        """Returns why it ended; None: it died."""
        self._send(Hello("generator", self.name, 0))
        self._send(Credit(self._credit))
        self._at = self._loop.time()
        self._serving = asyncio.create_task(self._serve(), name=self.name)
        try:
            await asyncio.wait([self._serving])
        finally:
            self.die()
        if not self._serving.cancelled():
            self._serving.result()
        return self.shutdown

    def die(self) -> None:
        """Silence: neither samples nor says anything from now on."""
        for timer in (self._timer, *self._others.values()):
            if timer is not None:
                timer.cancel()
        if self._serving is not None:
            self._serving.cancel()

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def weights(self) -> WeightsId | None:
        return self._swaps[-1].weights if self._swaps else None

    # --- what the controller says -----------------------------------------------------------------------------

    async def _serve(self) -> None:
        while self.shutdown is None:
            messages = await self._transport.receive()
            self._bring_forward()
            for message in messages:
                if isinstance(message, Ack):  # every other message is one, and they change nothing for the engine
                    for member in message.members:
                        self._unacked.pop((message.group_id, member), None)
                else:
                    self._handle(message)
                    self._carry_on()

    def _handle(self, message: ToGenerator) -> None:
        match message:
            case Lease(groups):
                for lease in groups:
                    if lease.purpose == "train":
                        self._log.leased(lease.group_id, lease.members, self._at)
                    self._take(lease)
            case Cancel(group_id, members):
                self._cancel(group_id, members)
            case Yield(group_id, members):
                self._yield(group_id, members)
            case WeightsAnnounce(weights):
                self._newest = weights
                self._swap_if_newer()
            case DeviceTurn(hold=hold):
                self._turn = message
                if hold:
                    self._take_device()
                elif self._loading is None:
                    self._leave_device()
            case Heartbeat():
                self._send(Heartbeat(self._activity(), self.weights))
            case HelloAck(heartbeat_s=heartbeat_s):
                self._heartbeat_s = self._heartbeat_s or heartbeat_s
                self._beat()
            case Shutdown():
                self.shutdown = message
            case WeightGroup():
                pass
            case _:
                raise ProtocolError(f"a generator does not expect {type(message).__name__}")

    def _take(self, lease: GroupLease) -> None:
        live = self.weights
        if live is None or live.version < lease.min_version:
            self._held.append(lease)
            return
        lengths = self._draw(lease.group_id).tokens
        most = lease.sampling.max_new_tokens
        for member in lease.members:
            length = lengths[member]
            row = Row(lease, member, min(length, most), "eos" if length <= most else "length")
            for segment in lease.segments:
                if segment.member == member:
                    row.past += _shifted(segment.spans, row.start)
                    row.start += len(segment.tokens) // TOKEN_BYTES
            row.sent = row.start
            row.limit = row.start + lease.lease_tokens if lease.lease_tokens else row.total
            self._waiting[lease.group_id, member] = row

    def _cancel(self, group_id: int, members: list[int]) -> None:
        for member in members:
            row = self._rows.pop((group_id, member), None) or self._waiting.pop((group_id, member), None)
            if row is not None:
                row.gone = True
                self._ended += 1
                self._log.ended(group_id, member, self._at)
        for lease in [lease for lease in self._held if lease.group_id == group_id]:
            self._ended += sum(member in members for member in lease.members)
            lease.members[:] = [member for member in lease.members if member not in members]
        self._held = [lease for lease in self._held if lease.members]

    def _yield(self, group_id: int, members: list[int]) -> None:
        """What runs goes back with all its tokens; what is about to be found at its end stays."""
        for member in members:
            row = self._rows.get((group_id, member))
            if row is not None and (until := self._position(row)) < row.total:
                row.gone = True
                self._segment(row, max(until, row.sent), yields=True)

    # --- weights ----------------------------------------------------------------------------------------------

    def _swap_if_newer(self) -> None:
        if self._loading is not None or self._newest is None or not self._on_device:
            return
        if self._newest == self.weights and self._turn is None:  # said again after our Hello
            self._send(WeightsLive(self._newest, 0.0))
            return
        self._loading = self._newest
        self._others["swap"] = self._loop.call_later(self._model.pause_s, self._swapped)
        self.trace.pauses.append((self._at, self._at + self._model.pause_s))

    def _swapped(self) -> None:
        self._bring_forward()
        assert self._loading is not None
        loaded, self._loading = self._loading, None
        returns = self._turn is not None and self._turn.hold
        self._swaps.append(Swap(self._clock, loaded, returns))
        self._send(WeightsLive(loaded, self._model.pause_s))
        self._send(Positions(loaded, self._positions()))
        if self._turn is not None:
            if returns:
                self._answer_turn(self._turn)
            else:
                self._leave_device()
        held, self._held = self._held, []
        for lease in held:
            self._take(lease)
        if self._newest != loaded:
            self._swap_if_newer()
        self._carry_on()

    def _take_device(self) -> None:
        assert self._share is not None
        self._share(True)
        self._on_device = True
        self._swap_if_newer()

    def _leave_device(self) -> None:
        """It stands still at once; what is sampled stays."""
        assert self._turn is not None and self.weights is not None
        turn, self._on_device = self._turn, False
        self._send(Positions(self.weights, self._positions()))
        self._others["leave"] = self._loop.call_later(self._turn_s, self._answer_turn, turn)

    def _answer_turn(self, turn: DeviceTurn) -> None:
        self._turn = None
        if not turn.hold:
            assert self._share is not None
            self._share(False)
        self._send(DeviceHeld(turn.number, turn.hold, self._model.pause_s if turn.hold else self._turn_s))

    def _positions(self) -> list[tuple[int, int, int]]:
        """What unfinished training rollouts have sampled so far."""
        found: list[tuple[int, int, int]] = []
        for (group_id, member), row in self._rows.items():
            sampled = self._position(row)
            if sampled and row.lease.purpose == "train":
                found.append((group_id, member, sampled))
        found += [(*key, row.start) for key, row in self._waiting.items() if row.start and row.lease.purpose == "train"]
        return found

    def _position(self, row: Row) -> int:
        """Tokens that a row in a slot has, to the nearest."""
        return row.start + int(self._clock + 0.5 - row.since)

    # --- the engine -------------------------------------------------------------------------------------------

    def _bring_forward(self) -> None:
        """The clock to now."""
        now = self._loop.time()
        if self._rows and self._loading is None and self._on_device:
            stood = min(self._prefill_s, now - self._at)
            self._prefill_s -= stood
            tokens = (now - self._at - stood) / self._token_s
            self._clock += tokens
            self._sampled += tokens * len(self._rows)
        self._at = now

    def _wake(self) -> None:
        self._timer = None
        self._bring_forward()
        self._carry_on()

    def _carry_on(self) -> None:
        """Whatever the clock and the last messages brought: what is due, free slots, the next timer."""
        due, clock = self._due, self._clock + ROUNDING
        if self._loading is None and self._on_device:
            ended: list[Row] = []
            while due and (due[0][0] <= clock or due[0][2].gone):
                row = heapq.heappop(due)[2]
                if not row.gone:
                    self._reached(row, ended)
            if ended:
                self._finish(ended)
        self._fill()
        if self._ended > self._told:
            self._told = self._ended
            self._send(Credit(self._credit + self._ended))
        self._rearm()

    def _fill(self) -> None:
        rows, waiting = self._rows, self._waiting
        if self._swaps and self._on_device:
            while waiting and len(rows) < self._model.slots:
                key = next(iter(waiting))
                row = rows[key] = waiting.pop(key)
                row.since, row.swap = self._clock, len(self._swaps) - 1
                self._prefill_s += row.start * self._model.prefill_s
                self._push(row)

    def _push(self, row: Row) -> None:
        """When it next ends, hands over a segment, or has used up its lease."""
        until = min(row.total, row.limit)
        if row.lease.segment_tokens:
            until = min(until, row.sent + row.lease.segment_tokens)
        self._numbers += 1
        heapq.heappush(self._due, (row.since + until - row.start, self._numbers, row))

    def _rearm(self) -> None:
        running, trace = len(self._rows), self.trace
        if not trace.running or trace.running[-1] != running:
            trace.times.append(self._at)
            trace.running.append(running)
            self._token_s = self._model.step_s + self._model.sequence_s * running
        if not self._on_device:
            cause, at = "off_device", None
        elif self._loading is not None:
            cause, at = "weight_swap", None
        elif running:
            cause = "engine_step"
            at = self._at + self._prefill_s + max(0.0, self._due[0][0] - self._clock) * self._token_s
            if self._model.grain_s:
                at = ceil(at / self._model.grain_s) * self._model.grain_s
        else:
            cause, at = "wait_weights" if self._held else "wait_lease", None
        self.tracker.switch(cause)
        timer = self._timer
        if timer is not None:
            if at is not None and timer.when() == at:
                return
            timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._wake)

    # --- what was sampled -------------------------------------------------------------------------------------

    def _reached(self, row: Row, ended: list[Row]) -> None:
        """The clock stands where the row is due."""
        if row.total <= row.limit and self._clock + ROUNDING >= row.since + row.total - row.start:
            del self._rows[row.group_id, row.member]
            ended.append(row)
            return
        until = round(self._clock - row.since) + row.start
        self._segment(row, until, yields=until >= row.limit)

    def _segment(self, row: Row, until: int, *, yields: bool) -> None:
        """Tokens [sent, until) leave; with `yields` the row does."""
        spans = self._spans(row, row.sent, until) if until > row.sent else []
        sampled = bytes(TOKEN_BYTES * (until - row.sent))
        self._send(
            Segment(
                row.group_id, row.member, 0, row.sent, 0, sampled, sampled, _shifted(spans, -row.sent), yielded=yields
            )
        )
        row.past += spans
        row.sent = until
        if yields:
            del self._rows[row.group_id, row.member]
            self._ended += 1
        else:
            self._push(row)

    def _spans(self, row: Row, begin: int, end: int) -> list[VersionSpan]:
        """Versions of tokens [begin, end) of a row that samples."""
        swaps, index = self._swaps, row.swap
        first = version = swaps[index].weights.version
        spans: list[VersionSpan] = []
        for clock, weights, recomputed in swaps[index + 1 :]:
            cut = row.start + int(clock - row.since + 0.5)
            if cut >= end:
                break
            if cut > begin:
                spans.append(VersionSpan(begin, cut, version, first))
                begin = cut
            version = weights.version
            first = version if recomputed else first
        spans.append(VersionSpan(begin, end, version, first))
        return spans

    def _finish(self, ended: list[Row]) -> None:
        weights = self._swaps[-1].weights
        together: dict[int, list[RolloutResult]] = {}
        leases: dict[int, GroupLease] = {}
        for row in ended:
            spans = self._spans(row, row.sent, row.total) if row.total > row.sent else []
            zeros = bytes(TOKEN_BYTES * row.total)
            reward = self._draw(row.group_id).rewards[row.member]
            result = RolloutResult(
                row.member, [Sequence(zeros, zeros, row.past + spans)], reward, finish_reason=row.reason
            )
            together.setdefault(row.group_id, []).append(result)
            leases[row.group_id] = row.lease
            if row.lease.purpose == "train":
                self._log.ended(row.group_id, row.member, self._at)
        self._ended += len(ended)
        for group_id, results in together.items():
            message = Finished(group_id, leases[group_id].purpose, results, weights)
            for result in results:
                self._unacked[group_id, result.member] = self._at, message
            self._send(message)

    # --- signs of life ----------------------------------------------------------------------------------------

    def _send(self, message: GeneratorMessage) -> None:
        self._spoke = self._loop.time()
        self._transport.send(message)

    def _beat(self) -> None:
        """A heartbeat where nothing else was said for so long, and results that were not acknowledged."""
        now, silence_s = self._loop.time(), self._heartbeat_s or 1.0
        if self._unacked and next(iter(self._unacked.values()))[0] <= now - RESEND_AFTER_S:
            late = {id(message): message for sent, message in self._unacked.values() if sent <= now - RESEND_AFTER_S}
            for message in late.values():
                for result in message.members:
                    key = message.group_id, result.member
                    if self._unacked.pop(key, None) is not None:
                        self._unacked[key] = now, message
                self._send(message)
        if now - self._spoke >= silence_s - 1e-6:
            self._bring_forward()
            self._rearm()
            self._send(Heartbeat(self._activity(), self.weights))
        self._others["beat"] = self._loop.call_at(self._spoke + silence_s, self._beat)

    def _activity(self) -> Activity:
        return Activity(self._loop.time(), self.tracker.seconds(), 0.0, int(self._sampled))


def _shifted(spans: list[VersionSpan], by: int) -> list[VersionSpan]:
    return [VersionSpan(span.start + by, span.end + by, span.version, span.kv_version) for span in spans]
