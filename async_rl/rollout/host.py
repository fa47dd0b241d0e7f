"""Runs the user's episodes and records what their policy samples. Knows neither sockets nor leases' holders.

The host lives on an event loop of its own (a thread, in a generator), so that slow user code stops neither a
heartbeat nor a decode step. All episodes of a lease that ask the policy in the same turn of the loop reach the engine
together: the engine then sees the same batches in every run of a synchronous recipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from async_rl.engines.protocol import Chunk, Engine, Request, Swap
from async_rl.environments.api import Environment, Reward
from async_rl.rollout.conversations import Text
from async_rl.rollout.desk import Asking
from async_rl.rollout.openai_server import OpenAIServer
from async_rl.rollout.policy import RecordedPolicy
from async_rl.rollout.progress import NoProgress, progress_timeout
from async_rl.telemetry.activity import Tracker
from async_rl.wire.messages import Failed, Finished, GroupLease, RolloutResult, Segment, WeightsId

MAX_TRACEBACK_CHARACTERS = 20_000
NO_WEIGHTS = WeightsId(0, -1)


def _nowhere(segments: list[Segment]) -> None:
    """Nothing outlives this process."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that is with the engine."""

    policy: Asking
    done: asyncio.Future[None]


class EpisodeHost:
    """Call `run` on the host's loop and the other methods from there too, except `deliver_threadsafe` and
    `in_environment`.

    Args:
        started: called on the host's loop when it takes calls.
        report: gets the Finished and Failed messages of one turn of the loop, on the host's loop.
        persist: gets the segments of one turn of the loop, before `report` gets what ended in it.
        timeout_s: an episode without progress for so long is failed.
        endpoint_host: where the endpoint for agents listens, once an episode asks for it.
    """

    def __init__(
        self,
        environment: Environment,
        text: Text,
        engine: Engine,
        *,
        timeout_s: float,
        started: Callable[[], None],
        report: Callable[[list[Finished | Failed]], None],
        clock: Callable[[], float],
        persist: Callable[[list[Segment]], None] = _nowhere,
        endpoint_host: str = "127.0.0.1",
    ) -> None:
        self.text = text
        self.tracker = Tracker("wait_lease", clock=clock)
        """hand_over: a request is on its way to the engine, in it, or back. environment: episodes run, none waits for
        the engine. wait_weights: leases wait for newer weights. wait_lease: nothing to do, admission is closed.
        Whatever else there is: off_device, device_turn, as `share_device` says."""
        self.sampled_tokens = 0
        self._environment, self._engine = environment, engine
        self._timeout_s, self._started, self._report, self._persist = timeout_s, started, report, persist
        self._episodes: dict[tuple[int, int], tuple[asyncio.Task[None], RecordedPolicy]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._submitted: list[Request] = []
        self._delivered = 0
        """Chunks of the engine so far."""
        self._ended: dict[int, tuple[GroupLease, list[RolloutResult], list[Failed]]] = {}
        self._segments: list[Segment] = []
        self._held = False
        self._device: str | None = None
        self._request_id = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._closing = asyncio.Event()
        self._openai = OpenAIServer(endpoint_host)

    async def run(self) -> None:
        """Until `close`; then every episode is cancelled. Errors of ours, not of user code, raise from here."""
        self.loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._started()
                await self._closing.wait()
                for task, _ in list(self._episodes.values()):
                    task.cancel()
        finally:
            await self._openai.stop()

    def close(self) -> None:
        self._closing.set()

    def start(self, leases: Sequence[GroupLease]) -> None:
        """Begin an episode for every member of every lease."""
        assert self._tasks is not None, "run() is not running"
        for lease in leases:
            for member in lease.members:
                policy = RecordedPolicy(self, lease, member)
                name = f"rollout {lease.group_id}/{member}"
                task = self._tasks.create_task(self._episode(policy), name=name)
                self._episodes[lease.group_id, member] = (task, policy)
        self._attribute()

    def cancel(self, group_id: int, members: Sequence[int]) -> None:
        """Stop these members without a report; the engine lets go of their requests."""
        stopped = [self._episodes.pop(key) for m in members if (key := (group_id, m)) in self._episodes]
        self._withdraw([request_id for _, policy in stopped for request_id in policy.request_ids])
        for task, _ in stopped:
            task.cancel()
        self._attribute()

    def hand_back(self, group_id: int, members: Sequence[int]) -> None:
        """These members yield as soon as they can: now if the engine has their request, else when they next ask for
        tokens. Those that end before are reported as ever."""
        for member in members:
            _, policy = self._episodes.get((group_id, member), (None, None))
            if policy is not None and policy.hand_back():
                self.recall(policy.request_ids)

    def hold(self, waiting: bool) -> None:
        """Whether leases wait for newer weights; only for the attribution of idle time."""
        self._held = waiting
        self._attribute()

    def share_device(self, cause: str | None) -> None:
        """off_device: another process has the engine's device. device_turn: the engine takes or leaves it. None: it is
        the engine's. Only for the attribution of time."""
        self._device = cause
        self._attribute()

    def positions(self, swap: Swap) -> list[tuple[int, int, int]]:
        """(group id, member, tokens sampled in the episode when these weights went live) of every training rollout
        that had any and has not ended since. However late it is asked, it answers for the moment of the swap."""
        policies = [policy for _, policy in self._episodes.values() if policy.lease.purpose == "train"]
        sampled = [(policy.lease.group_id, policy.member, policy.sampled_at(swap)) for policy in policies]
        return [position for position in sampled if position[2] > 0]

    def in_environment(self) -> list[str]:
        """The rollouts that may be blocking the host's loop, as `group/member`. Called from another thread, while the
        loop does not answer: the one whose code runs, if that is known."""
        running = asyncio.current_task(self.loop)
        inside = [
            (task, f"{group_id}/{member}")
            for (group_id, member), (task, policy) in list(self._episodes.items())
            if not policy.request_ids
        ]
        return [name for task, name in inside if task is running] or [name for _, name in inside]

    # --- for the policies -------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        return self._engine.capabilities.max_length

    def time(self) -> float:
        return self.loop.time()

    def stepped_at(self) -> float:
        return self._engine.stepped_at

    def next_request_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def ask(self, request: Request, policy: Asking) -> asyncio.Future[None]:
        """Requests of one turn of the loop are submitted together."""
        if not self._submitted:
            self.loop.call_soon(self._submit)
        self._submitted.append(request)
        done: asyncio.Future[None] = self.loop.create_future()
        self._waiting[request.id] = _Waiting(policy, done)
        return done

    def withdraw(self, request_id: int) -> None:
        self._withdraw([request_id])

    def recall(self, request_ids: Sequence[int]) -> None:
        if not request_ids:
            return
        if self._submitted:
            self._submit()  # what the engine does not have yet, it cannot hand back
        self._engine.cancel(request_ids)

    def persist(self, segment: Segment) -> None:
        self._flush_soon()
        self._segments.append(segment)

    def runs(self, policy: Asking) -> bool:
        episode = self._episodes.get((policy.lease.group_id, policy.member))
        return episode is not None and episode[1] is policy

    async def endpoint(self) -> OpenAIServer:
        await self._openai.start()
        return self._openai

    def leave(self, policy: Asking) -> None:
        task, _ = self._episodes.pop((policy.lease.group_id, policy.member))
        task.cancel()
        self._attribute()

    # --- the engine -------------------------------------------------------------------------------------------

    def deliver_threadsafe(self, chunks: Sequence[Chunk]) -> None:
        """The engine's callback, from whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop closed: the generator is on its way out
            self.loop.call_soon_threadsafe(self.deliver, chunks)

    def deliver(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._delivered += 1
            self.sampled_tokens += len(chunk.tokens)
            waiting = self._waiting.get(chunk.request_id)
            if waiting is None:
                continue  # cancelled meanwhile
            waiting.policy.receive(chunk, self._delivered)
            if chunk.finish_reason is not None:
                del self._waiting[chunk.request_id]
                if not waiting.done.done():
                    waiting.done.set_result(None)
        self._attribute()

    def _submit(self) -> None:
        requests = [request for request in self._submitted if request.id in self._waiting]
        self._submitted = []
        try:
            self._engine.submit(requests)
        except ValueError:  # one of them is impossible: find it, and let the others through
            for request in requests:
                try:
                    self._engine.submit([request])
                except ValueError as error:
                    self._waiting.pop(request.id).done.set_exception(error)
        self._attribute()

    def _withdraw(self, request_ids: Sequence[int]) -> None:
        known = [request_id for request_id in request_ids if self._waiting.pop(request_id, None) is not None]
        if known:
            self._engine.cancel(known)
            self._attribute()

    # --- episodes ---------------------------------------------------------------------------------------------

    async def _episode(self, policy: RecordedPolicy) -> None:
        lease, member = policy.lease, policy.member
        try:
            async with progress_timeout(self._timeout_s, policy):
                reward = Reward.of(await self._environment.episode(lease.task, policy))
            sequences = policy.recorder.sequences()
            if not sequences:
                raise ValueError("the episode ended without asking the policy: nothing to train on")
        except asyncio.CancelledError:
            return
        except NoProgress as stage:
            reason = f"no progress for environment.timeout_s = {self._timeout_s:g} s (stage: {stage})"
            self._fail(policy, reason, "")
        except Exception as error:  # user code may raise anything; it becomes a typed event here
            trace = traceback.format_exc()[-MAX_TRACEBACK_CHARACTERS:]
            self._fail(policy, f"{type(error).__name__}: {error}", trace)
        else:
            parts, metrics = dict(reward.parts), dict(reward.metrics)
            reason = policy.recorder.finish_reason
            self._end(policy, RolloutResult(member, sequences, reward.value, parts, metrics, reason))

    def _fail(self, policy: RecordedPolicy, reason: str, trace: str) -> None:
        lease = policy.lease
        self._end(policy, Failed(lease.group_id, lease.purpose, policy.member, reason, trace))

    def _end(self, policy: RecordedPolicy, outcome: RolloutResult | Failed) -> None:
        lease = policy.lease
        if not self.runs(policy):
            return  # it was cancelled or yielded, and user code went on regardless
        del self._episodes[lease.group_id, policy.member]
        self._flush_soon()
        _, results, failures = self._ended.setdefault(lease.group_id, (lease, [], []))
        if isinstance(outcome, Failed):
            failures.append(outcome)
        else:
            results.append(outcome)

    def _flush_soon(self) -> None:
        if not self._ended and not self._segments:
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        segments, self._segments = self._segments, []
        ended, self._ended = self._ended, {}
        if segments:
            self._persist(segments)
        weights = self._engine.weights or NO_WEIGHTS
        messages: list[Finished | Failed] = []
        for group_id, (lease, results, failures) in ended.items():
            if results:
                messages.append(Finished(group_id, lease.purpose, results, weights))
            messages += failures
        if messages:
            self._report(messages)
        self._attribute()

    def _attribute(self) -> None:
        if self._device is not None:
            cause = self._device
        elif self._waiting:
            cause = "hand_over"
        elif self._episodes:
            cause = "environment"
        else:
            cause = "wait_weights" if self._held else "wait_lease"
        self.tracker.switch(cause)
