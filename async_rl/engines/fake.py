"""Pure: an engine without a model on an asyncio loop, with seeded lengths and step times, in virtual or real time.

A decode step of n sequences takes `seconds_per_step + n * seconds_per_sequence` and gives each of them one token.
Nothing happens between two moments at which something changes, so a completion of thousands of tokens costs one
timer.

Lengths: the tokens of a rollout are cut by its key into pieces of lognormal length; a completion ends where a piece
ends. So a rollout that is resumed ends where it would have ended.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, floor
from statistics import NormalDist

import numpy as np

from async_rl.engines import sampling, validation
from async_rl.engines.protocol import Capabilities, Chunk, Deliver, Int32s, Request, Snapshot, Swap
from async_rl.engines.stopwatch import Stopwatch
from async_rl.engines.versions import Entry, VersionLog
from async_rl.wire.messages import FinishReason, WeightsId

CAUSES = ("idle", "engine_step", "swap", "paused", "released")
LENGTH_STREAM, LOGPROB_STREAM = 0x4C454E, 0x4C4F47
"""Mixed into a rollout's key for draws other than its tokens."""


@dataclass(slots=True)
class Row:
    """A sequence in a slot."""

    request: Request
    entry: Entry
    total: int
    """Tokens this completion will have, unless it is cancelled."""
    reason: FinishReason
    delivered: int = 0

    @property
    def due(self) -> int:
        """How many tokens the next chunk ends at."""
        return min(self.total, self.delivered + (self.request.segment_tokens or self.total))


class FakeEngine:
    """See engines.protocol.Engine. Every method is called on the loop that `start` ran on; chunks arrive there too."""

    def __init__(
        self,
        *,
        slots: int,
        max_length: int = 0,
        vocabulary: int = 256,
        median_tokens: float = 100.0,
        sigma: float = 0.5,
        seconds_per_step: float = 0.01,
        seconds_per_sequence: float = 0.0,
        swap_seconds: float = 0.0,
    ) -> None:
        """`sigma`: standard deviation of the logarithm of the length; 0 makes every completion `median_tokens` long."""
        self._slots = slots
        self._max_length = max_length
        self._vocabulary = vocabulary
        self._median_tokens = median_tokens
        self._sigma = sigma
        self._seconds_per_step = seconds_per_step
        self._seconds_per_sequence = seconds_per_sequence
        self._swap_seconds = swap_seconds
        self._weights: WeightsId | None = None
        self._versions = VersionLog()
        self._waiting: dict[int, Request] = {}
        self._rows: dict[int, Row] = {}
        self._due: list[
            tuple[int, int]
        ] = []  # heap of (tick, request id); entries of rows that left wake us for nothing
        self._allowed: dict[frozenset[int], Int32s] = {}
        """By stop tokens: the others."""
        self._posted: list[Callable[[], list[Chunk]]] = []
        self._paused = self._released = False
        self._lease: object | None = None
        """Of the pause that is on."""
        self._tick = 0
        self._since = 0.0
        """When the last tick ended, or the engine woke without having sampled."""
        self._stepped_at = float("-inf")
        self._delivered = 0
        """Chunks since the start."""
        self._step_s: float | None = None
        """How long the step in progress takes; None while nothing is sampled."""
        self._planned = 0
        """Ticks until the timer."""
        self._frozen_until = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopwatch: Stopwatch | None = None
        self._deliver: Deliver = _ignore
        self._stopped = asyncio.Event()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_concurrent=self._slots, max_length=self._max_length, leaves_device=True)

    @property
    def weights(self) -> WeightsId | None:
        return self._weights

    @property
    def stepped_at(self) -> float:
        if self._loop is not None and self._released:
            return self._loop.time()
        if self._loop is None or self._step_s is None:
            return self._stepped_at
        steps = floor((self._loop.time() - self._since) / self._step_s)
        return self._since + steps * self._step_s if steps > 0 else self._stepped_at

    def start(self, deliver: Deliver) -> None:
        assert self._loop is None, "an engine starts once"
        self._loop = asyncio.get_running_loop()
        self._stopwatch = Stopwatch(CAUSES, self._loop.time)
        self._deliver = deliver
        self._since = self._loop.time()
        self._set_timer()

    def submit(self, requests: Sequence[Request]) -> None:
        together = list(requests)
        for request in together:
            validation.check(request, vocabulary=self._vocabulary, max_length=self._max_length)

        def command() -> list[Chunk]:
            self._waiting.update((request.id, request) for request in together)
            return []

        self._post(command)

    def cancel(self, request_ids: Sequence[int]) -> None:
        ids = list(request_ids)
        self._post(lambda: self._cancel(ids))

    def pause(self, lease_s: float | None = None) -> None:
        lease = self._lease = object()
        self._post(lambda: self._set_paused(True))
        if lease_s is not None:
            asyncio.get_running_loop().call_later(lease_s, self._expire, lease)

    def resume(self) -> None:
        self._lease = None
        self._post(lambda: self._set_paused(False))

    async def load_weights(self, snapshot: Snapshot) -> Swap:
        swapped: asyncio.Future[Swap] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._swap(snapshot.weights, swapped))
        return await swapped

    async def release(self) -> Swap:
        released: asyncio.Future[Swap] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._leave(released))
        return await released

    def activity(self) -> dict[str, float]:
        return self._stopwatch.read() if self._stopwatch else dict.fromkeys(CAUSES, 0.0)

    def gauges(self) -> dict[str, float]:
        return {}

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._stopwatch is not None:
            self._stopwatch.switch(None)
        self._stopped.set()

    async def wait_stopped(self) -> None:
        """Returns after `stop`."""
        await self._stopped.wait()

    def _expire(self, lease: object) -> None:
        if self._lease is lease and not self._stopped.is_set():
            self.resume()

    # --- between two steps ----------------------------------------------------------------------------------

    def _post(self, command: Callable[[], list[Chunk]]) -> None:
        if self._stopped.is_set():
            raise RuntimeError("the engine has stopped")
        self._posted.append(command)
        self._set_timer()

    def _set_timer(self) -> None:
        """Wake at the end of the step after which something changes."""
        if self._loop is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        if self._step_s is not None:
            self._planned = self._due[0][0] - self._tick
            if self._posted:
                self._planned = min(self._planned, max(0, ceil((now - self._since) / self._step_s - 1e-9)))
            self._timer = self._loop.call_at(self._since + self._planned * self._step_s, self._wake)
        elif self._posted or self._frozen_until > now:
            self._timer = self._loop.call_at(max(now, self._frozen_until), self._wake)

    def _wake(self) -> None:
        assert self._loop is not None and self._stopwatch is not None
        if self._step_s is None:
            self._since = self._loop.time()
        else:
            self._tick += self._planned
            self._since += self._planned * self._step_s
            if self._planned:
                self._stepped_at = self._since
        chunks: list[Chunk] = []
        while self._due and self._due[0][0] <= self._tick:
            _, request_id = heapq.heappop(self._due)
            row = self._rows.get(request_id)
            if row is not None and row.entry.tick + row.due - 1 == self._tick:
                chunks.append(self._chunk(row, row.due, row.reason if row.due == row.total else None))
        self._delivered += len(chunks)
        posted, self._posted = self._posted, []
        for command in posted:
            more = command()
            self._delivered += len(more)
            chunks += more
        frozen = self._frozen_until > self._since
        if self._weights is not None and not frozen and not self._released:
            self._admit()
        if self._rows and not self._paused and not frozen and not self._released:
            self._step_s = self._seconds_per_step + len(self._rows) * self._seconds_per_sequence
            self._stopwatch.switch("engine_step")
        else:
            self._step_s = None
            resting = "released" if self._released else "paused" if self._paused else "idle"
            self._stopwatch.switch("swap" if frozen else resting)
        self._set_timer()
        if chunks:
            self._deliver(chunks)

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self._slots:
            request = self._waiting.pop(next(iter(self._waiting)))
            remaining = self._remaining(request)
            row = Row(
                request,
                self._versions.enter(self._tick + 1),
                total=min(remaining, request.max_new_tokens),
                reason="eos" if remaining <= request.max_new_tokens else "length",
            )
            self._rows[request.id] = row
            self._push(row)

    def _push(self, row: Row) -> None:
        heapq.heappush(self._due, (row.entry.tick + row.due - 1, row.request.id))

    def _cancel(self, request_ids: list[int]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request_id in request_ids:
            row = self._rows.get(request_id)
            if row is not None:
                chunks.append(self._chunk(row, self._tick - row.entry.tick + 1, "aborted"))
            elif self._waiting.pop(request_id, None) is not None:
                chunks.append(Chunk(request_id, np.empty(0, np.int32), np.empty(0, np.float32), [], "aborted"))
        return chunks

    def _set_paused(self, paused: bool) -> list[Chunk]:
        self._paused = paused
        return []

    def _swap(self, weights: WeightsId, swapped: asyncio.Future[Swap]) -> list[Chunk]:
        assert self._loop is not None
        if swapped.cancelled():
            return []
        self._weights = weights
        self._versions.swap(self._tick, weights.version, recomputed=self._released)
        self._released = False
        self._frozen_until = self._since + self._swap_seconds
        swap = Swap(self._swap_seconds, self._sampled(), self._delivered)
        self._loop.call_at(self._frozen_until, _resolve, swapped, swap)
        return []

    def _leave(self, released: asyncio.Future[Swap]) -> list[Chunk]:
        self._released = True
        _resolve(released, Swap(0.0, self._sampled(), self._delivered))
        return []

    def _sampled(self) -> dict[int, int]:
        """request id -> tokens so far."""
        return {row.request.id: self._tick - row.entry.tick + 1 for row in self._rows.values()}

    # --- what is sampled --------------------------------------------------------------------------------------

    def _remaining(self, request: Request) -> int:
        """Tokens until the piece that `position` lies in ends."""
        end = piece = 0
        while end <= request.position:
            u = sampling.uniform(sampling.mix(request.key ^ LENGTH_STREAM), piece)
            normal = NormalDist().inv_cdf(max(u, 2.0**-sampling.UNIFORM_BITS))
            end += max(1, round(self._median_tokens * exp(self._sigma * normal)))
            piece += 1
        return end - request.position

    def _chunk(self, row: Row, last: int, reason: FinishReason | None) -> Chunk:
        """Tokens up to `last`; a row that is over leaves its slot."""
        request, first = row.request, row.delivered
        positions = np.arange(request.position + first, request.position + last)
        allowed = self._allowed.get(request.stop)
        if allowed is None:
            allowed = np.setdiff1d(np.arange(self._vocabulary, dtype=np.int32), list(request.stop))
            self._allowed[request.stop] = allowed
        uniforms = sampling.uniforms(request.key, positions)
        tokens = allowed[(uniforms * len(allowed)).astype(np.int64)]
        if reason == "eos" and request.stop:
            tokens[-1] = min(request.stop)
        uniforms = sampling.uniforms(sampling.mix(request.key ^ LOGPROB_STREAM), positions)
        logprobs = np.log1p(-uniforms).astype(np.float32)
        spans = self._versions.spans(row.entry, first, last)
        row.delivered = last
        if reason is None:
            self._push(row)
        else:
            del self._rows[request.id]
        return Chunk(request.id, tokens, logprobs, spans, reason)


def _resolve(future: asyncio.Future[Swap], swap: Swap) -> None:
    if not future.done():
        future.set_result(swap)


def _ignore(chunks: Sequence[Chunk]) -> None:
    """Until the engine is started there is nothing to deliver."""
