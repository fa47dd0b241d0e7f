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
from typing import Protocol

from async_rl.engines.protocol import Chunk, Engine, Request
from async_rl.engines.sampling import rollout_key
from async_rl.environments.api import Environment, Message, Reward
from async_rl.rollout.recorder import Recorder
from async_rl.telemetry.activity import Tracker
from async_rl.wire.messages import Failed, Finished, FinishReason, GroupLease, RolloutResult, WeightsId

MAX_TRACEBACK_CHARACTERS = 20_000
NO_WEIGHTS = WeightsId(0, -1)


class Text(Protocol):
    """The tokenizer, as far as rollouts need it (models.text for real models)."""

    stop_tokens: frozenset[int]

    def encode(self, text: str) -> tuple[int, ...]: ...

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class RecordedReply:
    """What a call returned; the text is decoded when it is read."""

    decoder: Text
    tokens: list[int]
    finish_reason: FinishReason

    @property
    def text(self) -> str:
        return self.decoder.decode(self.tokens)


class RecordedPolicy:
    """The policy of one episode."""

    __slots__ = ("_host", "_key", "_lease", "recorder", "request_id")

    def __init__(self, host: EpisodeHost, lease: GroupLease, member: int) -> None:
        self._host, self._lease = host, lease
        self._key = rollout_key(lease.sampling.seed, lease.group_id << 16 | member)
        self.recorder = Recorder()
        self.request_id: int | None = None
        """Of the call that is with the engine now."""

    async def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None) -> RecordedReply:
        return await self._call(self._host.text.encode_chat(messages), max_new_tokens)

    async def complete(self, prompt: str | Sequence[int], *, max_new_tokens: int | None = None) -> RecordedReply:
        tokens = self._host.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        return await self._call(tokens, max_new_tokens)

    async def _call(self, prompt: tuple[int, ...], max_new_tokens: int | None) -> RecordedReply:
        sampling, host, recorder = self._lease.sampling, self._host, self.recorder
        recorder.call(prompt)
        self.request_id = host.next_request_id()
        request = Request(
            id=self.request_id,
            prompt=prompt,
            max_new_tokens=min(sampling.max_new_tokens, max_new_tokens or sampling.max_new_tokens),
            key=self._key,
            temperature=sampling.temperature,
            position=recorder.num_sampled,
            stop=host.text.stop_tokens,
        )
        tokens: list[int] = []
        for chunk in await host.ask(request):
            recorder.sampled(chunk)
            tokens += chunk.tokens.tolist()
        self.request_id = None
        return RecordedReply(host.text, tokens, recorder.finish_reason)


class EpisodeHost:
    """Call `run` on the host's loop and the other methods from there too, except `deliver_threadsafe`.

    Args:
        started: called on the host's loop when it takes calls.
        report: gets the Finished and Failed messages of one turn of the loop, on the host's loop.
        timeout_s: an episode that takes longer is failed.
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
    ) -> None:
        self.text = text
        self.tracker = Tracker("wait_lease", clock=clock)
        """hand_over: a request is on its way to the engine, in it, or back. environment: episodes run, none waits for
        the engine. wait_weights: leases wait for newer weights. wait_lease: nothing to do, admission is closed."""
        self.sampled_tokens = 0
        self._environment, self._engine = environment, engine
        self._timeout_s, self._started, self._report = timeout_s, started, report
        self._episodes: dict[tuple[int, int], tuple[asyncio.Task[None], RecordedPolicy]] = {}
        self._calls: dict[int, tuple[asyncio.Future[list[Chunk]], list[Chunk]]] = {}
        self._submitted: list[Request] = []
        self._ended: dict[int, tuple[GroupLease, list[RolloutResult], list[Failed]]] = {}
        self._held = False
        self._request_id = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._closing = asyncio.Event()

    async def run(self) -> None:
        """Until `close`; then every episode is cancelled. Errors of ours, not of user code, raise from here."""
        self.loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._tasks:
            self._started()
            await self._closing.wait()
            for task, _ in list(self._episodes.values()):
                task.cancel()

    def close(self) -> None:
        self._closing.set()

    def start(self, leases: Sequence[GroupLease]) -> None:
        """Begin an episode for every member of every lease."""
        assert self._tasks is not None, "run() is not running"
        for lease in leases:
            for member in lease.members:
                policy = RecordedPolicy(self, lease, member)
                task = self._tasks.create_task(self._episode(lease, member, policy))
                self._episodes[lease.group_id, member] = (task, policy)
        self._attribute()

    def cancel(self, group_id: int, members: Sequence[int]) -> None:
        """Stop these members without a report; the engine lets go of their requests."""
        stopped = [self._episodes.pop(key) for m in members if (key := (group_id, m)) in self._episodes]
        self._engine.cancel([policy.request_id for _, policy in stopped if policy.request_id is not None])
        for task, policy in stopped:
            if policy.request_id is not None:
                self._calls.pop(policy.request_id, None)
            task.cancel()
        self._attribute()

    def hold(self, waiting: bool) -> None:
        """Whether leases wait for newer weights; only for the attribution of idle time."""
        self._held = waiting
        self._attribute()

    def next_request_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def ask(self, request: Request) -> asyncio.Future[list[Chunk]]:
        """The chunks of a request, complete. Requests of one turn of the loop are submitted together."""
        if not self._submitted:
            self.loop.call_soon(self._submit)
        self._submitted.append(request)
        done: asyncio.Future[list[Chunk]] = self.loop.create_future()
        self._calls[request.id] = (done, [])
        return done

    def deliver_threadsafe(self, chunks: Sequence[Chunk]) -> None:
        """The engine's callback, from whatever thread."""
        with contextlib.suppress(RuntimeError):  # the loop closed: the generator is on its way out
            self.loop.call_soon_threadsafe(self.deliver, chunks)

    def deliver(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self.sampled_tokens += len(chunk.tokens)
            call = self._calls.get(chunk.request_id)
            if call is None:
                continue  # cancelled meanwhile
            call[1].append(chunk)
            if chunk.finish_reason is not None:
                del self._calls[chunk.request_id]
                if not call[0].done():
                    call[0].set_result(call[1])
        self._attribute()

    def _submit(self) -> None:
        requests, self._submitted = self._submitted, []
        try:
            self._engine.submit(requests)
        except ValueError:  # one of them is impossible: find it, and let the others through
            for request in requests:
                try:
                    self._engine.submit([request])
                except ValueError as error:
                    done, _ = self._calls.pop(request.id)
                    done.set_exception(error)
        self._attribute()

    async def _episode(self, lease: GroupLease, member: int, policy: RecordedPolicy) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                reward = Reward.of(await self._environment.episode(lease.task, policy))
            sequences = policy.recorder.sequences()
            if not sequences:
                raise ValueError("the episode ended without asking the policy: nothing to train on")
        except asyncio.CancelledError:
            return
        except TimeoutError:
            self._fail(lease, member, policy, f"took longer than environment.timeout_s = {self._timeout_s}", "")
        except Exception as error:  # user code may raise anything; it becomes a typed event here
            trace = traceback.format_exc()[-MAX_TRACEBACK_CHARACTERS:]
            self._fail(lease, member, policy, f"{type(error).__name__}: {error}", trace)
        else:
            result = RolloutResult(
                member,
                sequences,
                reward.value,
                dict(reward.parts),
                dict(reward.metrics),
                policy.recorder.finish_reason,
            )
            self._end(lease, member)[1].append(result)

    def _fail(self, lease: GroupLease, member: int, policy: RecordedPolicy, reason: str, trace: str) -> None:
        if policy.request_id is not None:
            self._calls.pop(policy.request_id, None)
            self._engine.cancel([policy.request_id])
        self._end(lease, member)[2].append(Failed(lease.group_id, lease.purpose, member, reason, trace))

    def _end(self, lease: GroupLease, member: int) -> tuple[GroupLease, list[RolloutResult], list[Failed]]:
        self._episodes.pop((lease.group_id, member), None)
        if not self._ended:
            self.loop.call_soon(self._flush)
        return self._ended.setdefault(lease.group_id, (lease, [], []))

    def _flush(self) -> None:
        ended, self._ended = self._ended, {}
        weights = self._engine.weights or NO_WEIGHTS
        messages: list[Finished | Failed] = []
        for group_id, (lease, results, failures) in ended.items():
            if results:
                messages.append(Finished(group_id, lease.purpose, results, weights))
            messages += failures
        self._report(messages)
        self._attribute()

    def _attribute(self) -> None:
        if self._calls:
            cause = "hand_over"
        elif self._episodes:
            cause = "environment"
        else:
            cause = "wait_weights" if self._held else "wait_lease"
        self.tracker.switch(cause)
