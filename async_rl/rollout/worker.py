"""The generator: leases in, scored rollouts out, weights swapped in between. The wire and the heartbeats live here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from async_rl.engines.protocol import Engine, Snapshot, Swap
from async_rl.environments.api import Environment
from async_rl.errors import AsyncRLError, ProtocolError
from async_rl.rollout.conversations import Text
from async_rl.rollout.device_turns import DeviceTurns
from async_rl.rollout.host import EpisodeHost
from async_rl.telemetry.activity import process_cpu_s
from async_rl.weights.errors import WeightsError, WeightsGone
from async_rl.weights.machine import machine
from async_rl.wire.messages import (
    Ack,
    Activity,
    Cancel,
    Credit,
    DeviceHeld,
    DeviceTurn,
    Failed,
    Finished,
    GeneratorMessage,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    Lease,
    Positions,
    Segment,
    Shutdown,
    ToGenerator,
    WeightGroup,
    WeightsAnnounce,
    WeightsFailed,
    WeightsId,
    WeightsLive,
    Yield,
)
from async_rl.wire.transport import NO_WELCOME, WELCOME_TIMEOUT_S, Client

RESEND_AFTER_S = 5.0
"""A result that was not acknowledged for so long is sent again."""

log = logging.getLogger(__name__)


class HostBlocked(AsyncRLError):
    """Code of the environment blocks the host's loop; only a new process gets rid of it."""


class WeightsReceiver(Protocol):
    """Where new weights come from (weights.receiver; in virtual time there is nothing to fetch)."""

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        """Raises WeightsError, saying why, if these weights cannot be had: the old ones stay live."""
        ...

    async def regroup(self, group: WeightGroup) -> None: ...


class HostRunner(Protocol):
    """Runs the episode host: on a thread of its own (rollout.host_thread), or inline in virtual time."""

    def __call__(self, host: EpisodeHost) -> Awaitable[None]: ...


class RolloutWorker:
    """`await run()` until the controller says Shutdown.

    What goes out keeps its order: the segments of a rollout before its Finished, WeightsLive before its Positions.
    Segments and positions are sent once; results until they are acknowledged.

    Args:
        credit: rollouts this generator holds at most, running or queued.
        timeout_s: an episode without progress for so long is failed; a host that does not answer for so long ends
            this process.
        run_host: how the host runs; returns when it is closed, raises what it raises.
        colocated: the engine shares its device with the learner, and starts off it.
        dtype: in which the engine computes, settled (models.precision).
        endpoint_host: where the endpoint for agents listens.
    """

    def __init__(
        self,
        *,
        name: str,
        transport: Client[GeneratorMessage, ToGenerator],
        engine: Engine,
        environment: Environment,
        text: Text,
        receiver: WeightsReceiver,
        credit: int,
        timeout_s: float,
        run_host: HostRunner,
        colocated: bool = False,
        dtype: str = "",
        endpoint_host: str = "127.0.0.1",
    ) -> None:
        self._name, self._transport, self._engine, self._receiver = name, transport, engine, receiver
        self._credit, self._run_host, self._dtype = credit, run_host, dtype
        self._loop = asyncio.get_running_loop()
        self.host = EpisodeHost(
            environment,
            text,
            engine,
            timeout_s=timeout_s,
            started=self._host_is_up,
            report=self._report_threadsafe,
            persist=self._persist_threadsafe,
            clock=self._loop.time,
            endpoint_host=endpoint_host,
        )
        self._timeout_s = timeout_s
        self._host_started = asyncio.Event()
        self._unanswered = 0
        """Heartbeats since the host's loop answered."""
        self._held: list[GroupLease] = []
        """Leases that wait for newer weights."""
        self._members: set[tuple[int, int]] = set()
        """(group id, member) of every rollout that was leased and has not ended."""
        self._unacked: dict[tuple[int, int], tuple[float, Finished | Failed]] = {}
        self._ended = 0
        """Rollouts that were finished, failed, cancelled or yielded."""
        self._newest: WeightsAnnounce | None = None
        self._loading = asyncio.Lock()
        self._loaded: WeightsAnnounce | None = None
        """Of the weights that were live last."""
        self._turns = DeviceTurns(
            colocated,
            engine,
            take=self._take_newest,
            share=lambda cause: self.host_call(self.host.share_device, cause),
            answer=self._answer_turn,
        )
        self._background: set[asyncio.Task[None]] = set()
        self._welcomed: asyncio.Future[float] = self._loop.create_future()
        """The heartbeat interval, once the controller has answered the Hello."""
        self.shutdown: Shutdown | None = None

    async def run(self) -> Shutdown:
        """Returns why it ended; `restart` is set where only a new process can go on. Raises what the engine, the host
        or the wire raise."""
        self._engine.start(self.host.deliver_threadsafe)
        pid, live = os.getpid(), self._engine.weights
        self._transport.send(Hello("generator", self._name, pid, weights=live, machine=machine(), dtype=self._dtype))
        self._send_credit()
        try:
            await self._run()
        except* HostBlocked as group:
            reason = str(group.exceptions[0])
            log.error("%s", reason)
            self.host_call(self.host.close)  # should it ever wake up
            self.shutdown = Shutdown(reason, restart=True)
        await self._engine.stop()
        assert self.shutdown is not None
        return self.shutdown

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            host = self._tasks.create_task(self._host(), name="episode host")
            self._in_background(self._beat())
            self._in_background(self._engine.wait_stopped())
            await self._serve()
            self.host_call(self.host.close)
            await host
            for task in self._background:
                task.cancel()

    def activity(self) -> Activity:
        """Causes of the host; within the time that requests spend away from it, the steps of the engine."""
        seconds = self.host.tracker.seconds()
        seconds["hand_over/engine_step"] = self._engine.activity()["engine_step"]
        gauges = self._engine.gauges()
        return Activity(self._loop.time(), seconds, process_cpu_s(), self.host.sampled_tokens, gauges)

    def host_call(self, method: Callable[..., None], *args: object) -> None:
        """Call a method of the host on the host's loop."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: it runs nothing any more
            self.host.loop.call_soon_threadsafe(method, *args)

    def _from_host(self, method: Callable[..., None], *args: object) -> None:
        """Call a method of ours from the host's loop."""
        with contextlib.suppress(RuntimeError):  # we gave up on the host, and our loop is closed
            self._loop.call_soon_threadsafe(method, *args)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _host(self) -> None:
        await self._run_host(self.host)

    async def _serve(self) -> None:
        await self._host_started.wait()
        if not self._turns.on_device:
            self.host_call(self.host.share_device, "off_device")
        while self.shutdown is None:
            for message in await self._transport.receive():
                self._handle(message)

    def _handle(self, message: ToGenerator) -> None:
        match message:
            case Lease(groups):
                self._members |= {(lease.group_id, member) for lease in groups for member in lease.members}
                self._held += groups
                self._release()
            case Ack(group_id, members):
                for member in members:
                    self._unacked.pop((group_id, member), None)
            case Cancel(group_id, members):
                self._held = [left for lease in self._held if (left := _without(lease, group_id, members)).members]
                for member in members:
                    self._unacked.pop((group_id, member), None)
                self.host_call(self.host.cancel, group_id, members)
                self._end(group_id, members)
                self._send_credit()
            case Yield(group_id, members):
                self.host_call(self.host.hand_back, group_id, members)
            case WeightsAnnounce():
                self._newest = message
                if self._turns.on_device:
                    self._in_background(self._take_weights(message))
            case DeviceTurn():
                self._in_background(self._turns.obey(message))
            case WeightGroup():
                self._in_background(self._regroup(message))
            case Heartbeat():
                self._send_heartbeat()
            case HelloAck(worker_id, heartbeat_s=heartbeat_s):
                log.info("welcome, %s", worker_id)
                if not self._welcomed.done():
                    self._welcomed.set_result(heartbeat_s)
            case Shutdown():
                self.shutdown = message
            case _:
                raise ProtocolError(f"a generator does not expect {type(message).__name__}")

    def _release(self) -> None:
        """Start the leases whose weights are here."""
        live = self._engine.weights
        version = -1 if live is None else live.version
        starting = [lease for lease in self._held if lease.min_version <= version]
        self._held = [lease for lease in self._held if lease.min_version > version]
        if starting:
            self.host_call(self.host.start, starting)
        self.host_call(self.host.hold, bool(self._held))

    async def _take_weights(self, announce: WeightsAnnounce) -> None:
        if announce.transport != "process_group" and (announce is not self._newest or self._holds(announce.weights)):
            return  # a file can be skipped; a broadcast has to be joined
        try:
            snapshot = await self._receiver.fetch(announce)
            async with self._loading:
                if not self._turns.on_device or self._holds(snapshot.weights):
                    return  # they are taken with the device; newer ones came another way
                swap = await self._engine.load_weights(snapshot)
                self._loaded = announce
                self._transport.send(WeightsLive(snapshot.weights, swap.stall_s))
                self.host_call(self._tell_positions, snapshot.weights, swap)
                self._turns.live(swap)
        except WeightsGone:
            return  # newer ones are on their way
        except (WeightsError, ValueError) as error:
            log.warning("weights %s did not arrive: %s", announce.weights, error)
            self._transport.send(WeightsFailed(announce.weights, str(error)))
            if self._turns.comes_back:
                await self._take_former()
            return
        self._release()

    async def _take_newest(self) -> None:
        if self._newest is not None:
            await self._take_weights(self._newest)

    async def _take_former(self) -> None:
        """An engine that comes back to its device, and does not get the newest weights, goes on with those it had."""
        if self._loaded is None:
            return
        try:
            snapshot = await self._receiver.fetch(self._loaded)
            async with self._loading:
                if self._turns.comes_back:
                    self._turns.live(await self._engine.load_weights(snapshot))
        except (WeightsError, ValueError) as error:
            log.warning("nor did weights %s: %s", self._loaded.weights, error)

    def _answer_turn(self, swap: Swap, held: DeviceHeld) -> None:
        """After the positions: the controller may compose as soon as it knows."""
        weights = self._engine.weights
        if not held.held and weights is not None:
            self.host_call(self._tell_positions, weights, swap)
        self.host_call(self._from_host, self._transport.send, held)

    def _holds(self, weights: WeightsId) -> bool:
        """These, or newer ones."""
        live = None if self._turns.comes_back else self._engine.weights
        return live is not None and live >= weights

    def _tell_positions(self, weights: WeightsId, swap: Swap) -> None:
        """On the host's loop."""
        self._from_host(self._transport.send, Positions(weights, self.host.positions(swap)))

    async def _regroup(self, group: WeightGroup) -> None:
        try:
            await self._receiver.regroup(group)
        except WeightsError as error:  # the learner, which waits for us in the same group, reports it
            log.warning("weight group %d was not formed: %s", group.epoch, error)

    async def _beat(self) -> None:
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                interval = await self._welcomed
        except TimeoutError:
            raise ProtocolError(NO_WELCOME) from None
        while True:
            await asyncio.sleep(interval)
            self._send_heartbeat()
            overdue = self._loop.time() - RESEND_AFTER_S
            late = {id(m): m for sent, m in self._unacked.values() if sent < overdue}
            self._send_results(list(late.values()))
            self._ping_host(interval)

    def _ping_host(self, interval: float) -> None:
        """Time is counted in heartbeats of this process, so that a pause of all of it is not the host's silence."""
        if self._unanswered == 0:
            self.host_call(self._host_answers)
        elif self._unanswered * interval >= self._timeout_s:
            raise HostBlocked(
                f"the environment has blocked its event loop for environment.timeout_s = {self._timeout_s:g} s, so "
                f"this generator starts again; inside were rollouts {', '.join(self.host.in_environment()) or 'none'}; "
                "slow code that does not await belongs into asyncio.to_thread"
            )
        self._unanswered += 1

    def _host_answers(self) -> None:
        """On the host's loop."""
        self._unanswered = 0

    def _send_heartbeat(self) -> None:
        self._transport.send(Heartbeat(self.activity(), self._engine.weights))

    def _send_credit(self) -> None:
        self._transport.send(Credit(self._credit + self._ended))

    def _host_is_up(self) -> None:
        self._from_host(self._host_started.set)

    def _report_threadsafe(self, messages: list[Finished | Failed]) -> None:
        self._from_host(self._report, messages)

    def _persist_threadsafe(self, segments: list[Segment]) -> None:
        self._from_host(self._send_segments, segments)

    def _send_segments(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._transport.send(segment)
            if segment.yielded:
                self._end(segment.group_id, [segment.member])
        if any(segment.yielded for segment in segments):
            self._send_credit()

    def _still_leased(self, message: Finished | Failed) -> Finished | Failed | None:
        """The message less what was cancelled while it came from the host."""
        if isinstance(message, Failed):
            return message if (message.group_id, message.member) in self._members else None
        results = [result for result in message.members if (message.group_id, result.member) in self._members]
        return msgspec.structs.replace(message, members=results) if results else None

    def _end(self, group_id: int, members: Iterable[int]) -> None:
        """These rollouts need no place here any more. Ends that cross on the wire count once."""
        ended = self._members & {(group_id, member) for member in members}
        self._members -= ended
        self._ended += len(ended)

    def _report(self, messages: list[Finished | Failed]) -> None:
        leased = [left for message in messages if (left := self._still_leased(message))]
        for message in leased:
            self._end(message.group_id, _members(message))
        self._send_results(leased)
        self._send_heartbeat()
        self._send_credit()

    def _send_results(self, messages: list[Finished | Failed]) -> None:
        for message in messages:
            for member in _members(message):
                self._unacked[message.group_id, member] = (self._loop.time(), message)
            self._transport.send(message)


def _without(lease: GroupLease, group_id: int, members: Sequence[int]) -> GroupLease:
    """The lease, less these members if it is of that group."""
    if lease.group_id != group_id:
        return lease
    return msgspec.structs.replace(lease, members=[member for member in lease.members if member not in members])


def _members(message: Finished | Failed) -> list[int]:
    return [result.member for result in message.members] if isinstance(message, Finished) else [message.member]
