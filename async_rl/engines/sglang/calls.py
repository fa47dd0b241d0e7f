"""Requests on their way through the servers: waiting -> called, piece by piece -> delivered.

Everything happens on the engine's loop. At most `slots` requests are with the servers, the others wait here, where
they cost nothing and are cancelled at once; requests with an equal prompt that begin together are one call, except to a
router, which takes one at a time. A piece that a server took with it is sampled again, by whoever is there: what was
delivered before stays.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.engines.protocol import Chunk, Request
from async_rl.engines.sglang.client import ServerError, ServerGone, ServerRefused
from async_rl.engines.sglang.contract import RID_DIGITS, ContractBroken, Piece, generate_body, piece_limit, version_name
from async_rl.engines.sglang.server import ServerFailed
from async_rl.engines.sglang.worker import Worker
from async_rl.engines.waiting import Waiting
from async_rl.wire.messages import FinishReason, VersionSpan, WeightsId

MAX_LOSSES = 8
"""Pieces of one request that may be lost one after the other."""
RETRY_S = 0.5
ABORT_AGAIN_S = 1.0
"""An abort may overtake the request it is for, so it is repeated."""
ABORT_TRIES = 10
EVERY_TOKEN = 1 << 60
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Live:
    """A request that has begun."""

    request: Request
    entry: WeightsId | None
    """Weights when it began: under `keep`, the oldest that may have written its cache."""
    tokens: list[int] = field(default_factory=list[int])
    """Of pieces that are over."""
    logprobs: list[float] = field(default_factory=list[float])
    spans: list[VersionSpan] = field(default_factory=list[VersionSpan])
    """Over the tokens that are not delivered; positions count from the first of them."""
    delivered: int = 0
    piece: Piece | None = None
    worker: Worker | None = None
    """Whom its last piece is or was with."""
    cancelled: bool = False
    losses: int = 0
    refused_at: float | None = None
    """Since when nobody takes its piece."""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sampled(self) -> int:
        """Tokens so far, as far as a server has told."""
        return len(self.tokens) + (len(self.piece.tokens) if self.piece is not None else 0)

    @property
    def open_tokens(self) -> int:
        """Tokens that are not delivered, of pieces that are over."""
        return len(self.tokens) - self.delivered


class Calls:
    """`submit`, `cancel`, `admit`; chunks come through `deliver`."""

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        slots: int,
        max_input: int,
        stream_tokens: int,
        keeps_cache: bool,
        router: str,
        owner: str,
        start_s: float,
        deliver: Callable[[list[Chunk]], None],
        stepped: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """keeps_cache: sequences go on over KV of older weights, so that prefixes are salted with the weights a request
        began under. owner: whose weights count as ours. start_s: so long may nobody take a piece. stepped: tokens have
        come. changed: the number of requests with servers may have."""
        self._workers, self._slots, self._max_input = workers, slots, max_input
        self._stream_tokens, self._keeps_cache, self._router = stream_tokens, keeps_cache, router
        self._deliver, self._stepped, self._changed = deliver, stepped, changed
        self._owner, self._start_s = owner, start_s
        self._waiting = Waiting()
        self._running: dict[int, Live] = {}
        self._ready: deque[Live] = deque()
        """Running, and not with a server."""
        self._under_way: dict[Worker, set[asyncio.Timeout]] = {worker: set() for worker in workers}
        """Calls, by whom they were sent to; without a deadline of their own."""
        self._serial = itertools.count()
        self._process = f"{os.getpid():08d}"
        self._tasks: asyncio.TaskGroup | None = None
        self.weights: WeightsId | None = None
        """Under which a request begins that begins now."""
        self.held_by: set[str] = set()
        """Why nothing begins or goes on."""
        self.pieces = 0
        self._admitting = False
        self.idle = asyncio.Event()
        """No piece is with a server."""
        self.idle.set()

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Calls run in this group: it raises what breaks one."""
        self._tasks = tasks

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.add(requests)

    def sampled(self, worker: Worker) -> tuple[dict[int, int], dict[int, int]]:
        """request id -> tokens so far: of the requests that are with this worker, and of all others that have begun."""
        ours: dict[int, int] = {}
        others: dict[int, int] = {}
        for request_id, live in self._running.items():
            (ours if live.worker is worker else others)[request_id] = live.sampled
        return ours, others

    def begin_again(self) -> None:
        """No cache holds anything older than the weights of now."""
        for live in self._running.values():
            live.entry = self.weights

    def all_sampled(self) -> dict[int, int]:
        return {request_id: live.sampled for request_id, live in self._running.items()}

    def admit(self) -> None:
        """Call the servers with whatever may begin or go on; nothing where none is ready."""
        if self.held_by:
            return
        while self._ready and (worker := self._freest()) is not None:
            self._start(worker, [self._ready.popleft()])
        while len(self._running) < self._slots and (worker := self._freest()) is not None:
            admissions = self._waiting.take(self._slots - len(self._running), EVERY_TOKEN)
            if not admissions:
                break
            for admission in admissions:
                group = [Live(request, self.weights) for request in admission.requests]
                self._running |= {live.request.id: live for live in group}
                for together in [[live] for live in group] if self._router else [group]:
                    self._start(self._freest() or worker, together)
        self._changed()

    def _admit_soon(self) -> None:
        """Behind everything that has arrived with this piece: the slots of a group that ends go to a group, in one
        call, and not to its members one by one."""

        def admit() -> None:
            self._admitting = False
            self.admit()

        if not self._admitting:
            self._admitting = True
            asyncio.get_running_loop().call_soon(admit)

    def cancel(self, request_ids: Sequence[int]) -> None:
        ended: list[Chunk] = []
        for request_id in request_ids:
            live = self._running.get(request_id)
            if live is None:
                if self._waiting.remove(request_id) is not None:
                    ended.append(Chunk(request_id, np.empty(0, np.int32), np.empty(0, np.float32), [], "aborted"))
            elif not live.cancelled:
                live.cancelled = True
                if live.piece is None:
                    self._ready.remove(live)
                    ended.append(self._end(live, "aborted"))
                else:
                    self._task(self._abort(live, live.piece.rid), f"abort {live.piece.rid}")
        if ended:
            self._deliver(ended)
        self.admit()

    @property
    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # --- one call ---------------------------------------------------------------------------------------------

    def _start(self, worker: Worker, lives: list[Live]) -> None:
        for live in lives:
            live.piece, live.worker = self._piece(live), worker
        worker.pieces += len(lives)
        self.pieces += len(lives)
        self.idle.clear()
        self._task(self._call(worker, lives), f"call of {len(lives)} requests")

    def _piece(self, live: Live) -> Piece:
        request = live.request
        tokens = [*request.prompt, *live.tokens]
        left = request.segment_tokens and request.segment_tokens - live.open_tokens
        remaining = request.max_new_tokens - len(live.tokens)
        limit = piece_limit(len(tokens), remaining, left, self._max_input)
        serial = next(self._serial) % 10 ** (RID_DIGITS - len(self._process))
        return Piece(request, f"{self._process}{serial:0{RID_DIGITS - len(self._process)}d}", tokens, limit)

    async def _call(self, worker: Worker, lives: list[Live]) -> None:
        open_pieces = {live.piece.rid: live for live in lives if live.piece is not None}
        refusal = None
        try:
            await self._listen(worker, open_pieces)
        except ServerGone as error:
            log.warning("%s: %d pieces are sampled again", error, len(open_pieces))
            for one in self._busy(worker):
                one.suspect()
        except TimeoutError:
            log.warning("SGLang server %s hangs: %d pieces are sampled again", worker.client.url, len(open_pieces))
        except ContractBroken as error:
            log.warning("%s: %d pieces are sampled again", error, len(open_pieces))
        except ServerRefused as error:
            if not error.busy:
                raise
            log.warning("%s: %d pieces wait", error, len(open_pieces))
            refusal = error
        finally:
            worker.pieces -= len(lives)
            self.pieces -= len(lives)
            if not self.pieces:
                self.idle.set()
        lost = list(open_pieces.values())
        if lost:
            await asyncio.sleep(RETRY_S * max([refusal is not None, *(live.losses for live in lost)]))
        for live in lost:
            self._again(live, refusal)
        self.admit()

    async def _listen(self, worker: Worker, open_pieces: dict[str, Live]) -> None:
        """Take events until every piece is over; those that are leave `open_pieces`.

        Raises:
            TimeoutError: broken off.
            ServerError, ContractBroken
        """
        first = next(iter(open_pieces.values()))
        salt = version_name(self._owner, first.entry) if self._keeps_cache and first.entry is not None else ""
        pieces = [live.piece for live in open_pieces.values() if live.piece is not None]
        body = generate_body(pieces, stream_tokens=self._stream_tokens, salt=salt)
        under_way = self._under_way[worker]
        async with asyncio.timeout(None) as patience:
            under_way.add(patience)
            try:
                async for event in worker.client.generate(body, self._router):
                    self._hear(worker, open_pieces, event)
            finally:
                under_way.discard(patience)

    def _hear(self, worker: Worker, open_pieces: dict[str, Live], event: dict[str, Any]) -> None:
        live = open_pieces.get(event["meta_info"]["id"])
        if live is None or live.piece is None:
            return
        if live.piece.take(event):
            self._stepped()
        if live.piece.reason is not None:
            del open_pieces[live.piece.rid]
            worker.restarts = 0
            self._over(live, live.piece)

    def break_off(self, worker: Worker) -> None:
        """It hangs, so that its calls would never end. With a router any may be with it."""
        now = asyncio.get_running_loop().time()
        for one in self._busy(worker):
            for patience in self._under_way[one]:
                patience.reschedule(now)

    def _again(self, live: Live, refusal: ServerRefused | None = None) -> None:
        """Its piece is lost. refusal: nobody took it, as when a router has not seen yet that a server is back."""
        live.piece = None
        now = time.monotonic()
        if refusal is None:
            live.losses += 1
        else:
            live.refused_at = live.refused_at or now
        if live.cancelled:
            self._deliver([self._end(live, "aborted")])
        elif refusal is not None and live.refused_at is not None and now - live.refused_at > self._start_s:
            raise ServerFailed(f"{refusal}: for {self._start_s:g} s nobody has taken request {live.request.id}")
        elif live.losses > MAX_LOSSES:
            raise ServerFailed(
                f"request {live.request.id} was lost {live.losses} times in a row by the SGLang servers "
                f"{', '.join(worker.client.url for worker in self._workers)}: see the warnings above"
            )
        else:
            self._ready.append(live)

    # --- the end of a piece -----------------------------------------------------------------------------------

    def _over(self, live: Live, piece: Piece) -> None:
        spans = piece.spans(self._owner, live.entry if self._keeps_cache else None)
        if spans is None:
            log.warning("request %d was sampled by weights %s, which are not ours", live.request.id, piece.versions)
            if live.worker is not None:
                for one in self._busy(live.worker):
                    one.doubt()
            self._again(live)
            return
        live.piece, before = None, live.open_tokens
        live.tokens += piece.tokens
        live.logprobs += piece.logprobs
        live.losses = 0 if piece.tokens else live.losses + 1
        live.refused_at = None
        shifted = [VersionSpan(s.start + before, s.end + before, s.version, s.kv_version) for s in spans]
        live.spans = _joined([*live.spans, *shifted])
        reason = self._reason(live, piece)
        if reason is not None:
            self._deliver([self._end(live, reason)])
        else:
            segment = live.request.segment_tokens
            if segment is not None and live.open_tokens >= segment:
                self._deliver([self._chunk(live, None)])
            self._ready.append(live)
        self._admit_soon()

    def _reason(self, live: Live, piece: Piece) -> FinishReason | None:
        """None: it goes on."""
        request = live.request
        if piece.reason == "stop" and piece.tokens and piece.tokens[-1] in request.stop:
            return "eos"
        if len(live.tokens) >= request.max_new_tokens:
            return "length"
        if live.cancelled:
            return "aborted"
        if piece.reason == "length" and len(piece.tokens) < piece.limit:
            return "length"  # the server holds no more
        if live.losses > MAX_LOSSES:
            raise ServerFailed(f"request {request.id}: the SGLang server ended it {live.losses} times without a token")
        return None

    def _end(self, live: Live, reason: FinishReason) -> Chunk:
        del self._running[live.request.id]
        live.over.set()
        return self._chunk(live, reason)

    def _chunk(self, live: Live, reason: FinishReason | None) -> Chunk:
        """What is not delivered yet."""
        tokens = np.asarray(live.tokens[live.delivered :], np.int32)
        logprobs = np.asarray(live.logprobs[live.delivered :], np.float32)
        live.delivered, spans, live.spans = len(live.tokens), live.spans, []
        return Chunk(live.request.id, tokens, logprobs, spans, reason)

    # --- the rest ---------------------------------------------------------------------------------------------

    async def _abort(self, live: Live, rid: str) -> None:
        """Until the piece is over. With a router any of the servers may have it."""
        for _ in range(ABORT_TRIES):
            for worker in self._workers:
                try:
                    await worker.client.abort(rid)
                except ServerError as error:
                    log.warning("%s", error)  # a server that is gone has lost the piece: the call says so
            try:
                async with asyncio.timeout(ABORT_AGAIN_S):
                    await live.over.wait()
                return
            except TimeoutError:
                continue
        log.warning("request %d does not end although it was aborted %d times", live.request.id, ABORT_TRIES)

    def _busy(self, worker: Worker) -> Sequence[Worker]:
        """Who may have the pieces of a call: with a router, any."""
        return self._workers if self._router else [worker]

    def _freest(self) -> Worker | None:
        """With a router nothing begins while it might pass a piece to one that is away, or is back and lacks our
        weights."""
        if self._router and not all(worker.ready or worker.out for worker in self._workers):
            return None
        ready = [worker for worker in self._workers if worker.ready and not worker.out]
        return min(ready, key=lambda worker: worker.pieces, default=None)

    def _task(self, work: object, name: str) -> None:
        assert self._tasks is not None
        self._tasks.create_task(work, name=name)  # pyright: ignore[reportArgumentType]


def _joined(spans: list[VersionSpan]) -> list[VersionSpan]:
    """Neighbours of the same weights become one."""
    joined: list[VersionSpan] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and (last.version, last.kv_version) == (span.version, span.kv_version):
            joined[-1] = VersionSpan(last.start, span.end, span.version, span.kv_version)
        else:
            joined.append(span)
    return joined
