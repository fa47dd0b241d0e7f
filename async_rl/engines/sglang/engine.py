"""The engine protocol over SGLang servers: a thread with an event loop of its own, so that neither the wire nor user
code waits for JSON, and no server waits for them.

    submit -> Calls -> HTTP -> servers            one request in pieces (engines.sglang.contract)
    load_weights -> every Worker -> pause, buckets, version, resume
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from typing import Any

import aiohttp

from async_rl.engines import validation
from async_rl.engines.protocol import Capabilities, Chunk, Deliver, Request, Snapshot, Swap
from async_rl.engines.sglang.calls import Calls
from async_rl.engines.sglang.client import LINE_BYTES, ServerRefused, SGLangClient
from async_rl.engines.sglang.contract import CONTEXT_RESERVE, INPUT_RESERVE, new_owner
from async_rl.engines.sglang.lease import PauseLease
from async_rl.engines.sglang.moment import Moment
from async_rl.engines.sglang.push import WeightPush
from async_rl.engines.sglang.router import Place, Router
from async_rl.engines.sglang.server import ServerProcess
from async_rl.engines.sglang.settings import Settings
from async_rl.engines.sglang.update import ServerWeights
from async_rl.engines.sglang.worker import Worker
from async_rl.engines.stopwatch import Stopwatch
from async_rl.errors import UserError
from async_rl.weights.errors import WeightsError
from async_rl.wire.messages import WeightsId

CAUSES = ("idle", "engine_step", "swap", "paused", "released")
PAUSE, DRAIN, RELEASED, STOPPED = "pause", "drain", "released", "stopped"


class SGLangEngine:
    """See engines.protocol.Engine. Requests that come before the first weights, or while no server is up, wait.

    Tokens are drawn by the server's own generator: repeating a request does not repeat its tokens.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        slots: int,
        vocabulary: int,
        context: int,
        max_length: int = 0,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        """context: tokens the model holds; a server of it takes a few less. max_length: not more than these; 0: as many
        as there may be. shapes: of every parameter."""
        self._settings, self._slots, self._vocabulary, self._shapes = settings, slots, vocabulary, shapes
        most = context - CONTEXT_RESERVE
        self._max_length = min(max_length or most, most)
        self._max_input = min(self._max_length, context - INPUT_RESERVE)
        self._owner = new_owner()
        self._loop = asyncio.new_event_loop()
        self._gate = threading.Lock()
        self._closed: BaseException | None = None
        self._ended: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._stopwatch: Stopwatch | None = None
        self._stopping = asyncio.Event()
        self._loading = asyncio.Lock()
        self._swapping = self._released = False
        self._paused: asyncio.Event | None = None
        """Set to end the pause that is on."""
        self._weights: WeightsId | None = None
        self._stepped_at = float("-inf")
        self._delivered = 0
        self._loads: set[Future[Swap]] = set()
        self._early: list[Callable[[], Any]] | None = []
        """Commands that came before the thread could take any."""
        self._deliver: Deliver
        self._tasks: asyncio.TaskGroup
        self._calls: Calls
        self._workers: list[Worker] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            seeded=False,
            leaves_device=True,
            recomputes=self._settings.in_flight != "keep",
            max_concurrent=self._slots,
            max_length=self._max_length,
        )

    @property
    def weights(self) -> WeightsId | None:
        return self._weights

    @property
    def stepped_at(self) -> float:
        return time.monotonic() if self._released else self._stepped_at

    def start(self, deliver: Deliver) -> None:
        assert self._thread is None, "an engine starts once"
        self._deliver = deliver
        self._stopwatch = Stopwatch(CAUSES, time.monotonic)
        self._thread = threading.Thread(target=self._run, name="sglang-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        together = list(requests)
        for request in together:
            validation.check(request, vocabulary=self._vocabulary, max_length=self._max_length)
            if len(request.prompt) > self._max_input:
                raise ValueError(
                    f"request {request.id}: prompt of {len(request.prompt)} tokens: SGLang takes {self._max_input} of "
                    "this model"
                )
        self._post(lambda: self._submit(together))

    def cancel(self, request_ids: Sequence[int]) -> None:
        ids = list(request_ids)
        self._post(lambda: self._calls.cancel(ids))

    def pause(self, lease_s: float | None = None) -> None:
        seconds = self._settings.pause_s if lease_s is None else lease_s
        if threading.current_thread() is self._thread:  # out of a delivery: before anything else begins
            self._pause(seconds)
        else:
            self._post(lambda: self._pause(seconds))

    def resume(self) -> None:
        self._post(self._resume)

    async def load_weights(self, snapshot: Snapshot) -> Swap:
        """Into every server. Loads that overlap happen one after the other.

        Raises:
            ValueError: the snapshot is not of this model.
            WeightsError: the old weights stay live; also where a server refused a call.
        """
        self._check_names(snapshot)

        async def load() -> Swap:
            own = await asyncio.to_thread(_copy, snapshot) if self._settings.copy else snapshot
            try:
                return await self._update(own)
            except ServerRefused as error:
                raise WeightsError(str(error)) from error

        return await self._in_order(load)

    async def release(self) -> Swap:
        """A server frees its memory where it was started with --enable-memory-saver, on a GPU; elsewhere it only stands
        still. `nbytes` is 0: it is not our process.

        Raises:
            ServerRefused: it will not.
        """
        return await self._in_order(self._release)

    async def _in_order(self, work: Callable[[], Coroutine[Any, Any, Swap]]) -> Swap:
        """Loads and releases happen one after the other; one that nobody waits for any more is carried out as well."""
        done: Future[Swap] = Future()
        self._loads.add(done)
        done.add_done_callback(self._loads.discard)

        async def carry_out() -> None:
            try:
                async with self._loading:
                    swap = await work()
            except (ServerRefused, WeightsError) as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(swap)
            self._calls.admit()

        self._post(lambda: self._task(carry_out(), "weights"))
        return await asyncio.wrap_future(done)

    def gauges(self) -> dict[str, float]:
        """Of its servers together, as of the last look at them: how busy they are, and what had to be mended.
        `server_cache_used` is the share of the KV cache in use where it is largest."""
        if self._early is not None:
            return {}
        loads = [worker.load for worker in self._workers if worker.load is not None]
        return {
            "running": self._calls.num_running,
            "waiting": self._calls.num_waiting,
            "servers_ready": sum(worker.ready for worker in self._workers),
            "server_running": sum(load.running for load in loads),
            "server_waiting": sum(load.waiting for load in loads),
            "server_tokens_per_s": sum(load.tokens_per_s for load in loads),
            "server_cache_used": max((load.cache_used for load in loads), default=0.0),
            "restarts": sum(worker.restarted for worker in self._workers),
            "reloads": sum(worker.reloads for worker in self._workers),
            "foreign_pauses": sum(worker.foreign_pauses for worker in self._workers),
        }

    def activity(self) -> dict[str, float]:
        return self._stopwatch.read() if self._stopwatch else dict.fromkeys(CAUSES, 0.0)

    async def stop(self) -> None:
        if self._thread is None:
            self._close(None)
            self._loop.close()
            return
        with suppress(RuntimeError):  # it has ended already
            self._post(self._stopping.set)
        await asyncio.to_thread(self._thread.join)

    async def wait_stopped(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._ended))

    def _check_names(self, snapshot: Snapshot) -> None:
        for name, shape in self._shapes.items():
            if name not in snapshot.tensors:
                raise ValueError(f"the weights lack {name}")
            found = tuple(snapshot.tensors[name].shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}, this model has {shape}")

    def _post(self, command: Callable[[], Any]) -> None:
        with self._gate:
            if self._closed is not None:
                raise RuntimeError("the engine has stopped") from self._closed
            if self._early is not None:
                self._early.append(command)
            else:
                self._loop.call_soon_threadsafe(command)

    # --- on the engine's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._loop.run_until_complete(self._main())
        except _Stop:
            pass
        except BaseException as caught:
            error = caught
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
        assert self._stopwatch is not None
        self._stopwatch.switch(None)
        self._close(error)
        self._loop.close()

    async def _main(self) -> None:
        # a connection for each call: one that the server is just closing, for being idle, would look like its death
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=LINE_BYTES) as session:
            self._workers = self._make_workers(session)
            self._calls = Calls(
                self._workers,
                slots=self._slots,
                max_input=self._max_input,
                stream_tokens=self._settings.stream_tokens,
                keeps_cache=self._settings.in_flight == "keep",
                router=self._settings.router.rstrip("/"),
                owner=self._owner,
                start_s=self._settings.start_s,
                deliver=self._hand_over,
                stepped=self._step,
                changed=self._attribute,
            )
            try:
                await self._serve()
            except* _Stop:
                pass
            finally:
                await asyncio.gather(*(worker.close() for worker in self._workers))

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            self._calls.open(self._tasks)
            for worker in self._workers:
                self._task(worker.tend(), "server")
            with self._gate:
                early, self._early = self._early or [], None
            for command in early:
                command()
            await self._stopping.wait()
            self._calls.held_by.add(STOPPED)
            raise _Stop  # out of a group: that cancels whoever is in it

    def _make_workers(self, session: aiohttp.ClientSession) -> list[Worker]:
        settings = self._settings

        def client(url: str) -> SGLangClient:
            return SGLangClient(url, session, settings.keys)

        def weights(of: SGLangClient) -> ServerWeights:
            push = WeightPush(of, host=settings.host, backend=settings.backend, timeout_s=settings.timeout_s)
            return ServerWeights(
                of,
                push if settings.load_by == "group" else None,
                settings.scratch,
                mode="in_place" if settings.in_flight == "keep" else "retract",
                pause_s=settings.pause_s,
                timeout_s=settings.timeout_s,
                bucket_bytes=settings.bucket_bytes,
                owner=self._owner,
            )

        urls, router = settings.attach, None
        if settings.router:
            router = Router(settings.router, session, settings.keys, servers=len(urls))

        def worker(process: ServerProcess | None, url: str) -> Worker:
            return Worker(
                client,
                weights,
                process=process,
                url=url,
                start_s=settings.start_s,
                stuck_s=settings.stuck_s,
                max_input=self._max_input,
                place=Place(router, url) if router is not None else None,
                others_work=lambda: any(one.ready for one in self._workers),
                off_device=settings.off_device,
                owner=self._owner,
                news=lambda: self._calls.admit(),
                hangs=lambda one: self._calls.break_off(one),
            )

        if settings.command:
            return [worker(ServerProcess(settings.command, settings.environment, settings.log), "")]
        return [worker(None, url) for url in urls]

    def _submit(self, requests: list[Request]) -> None:
        self._calls.submit(requests)
        self._calls.admit()

    async def _update(self, snapshot: Snapshot) -> Swap:
        if self._settings.in_flight == "drain":
            await self._drain()
        moment = Moment(self._calls, lambda: self._delivered)
        self._swapping = True
        self._attribute()
        try:
            stalls = await self._update_all(snapshot, moment.note)
        finally:
            self._swapping = False
            self._calls.held_by.discard(DRAIN)
        self._weights = self._calls.weights = snapshot.weights
        if self._released:
            self._calls.begin_again()
        self._released = False
        self._calls.held_by.discard(RELEASED)
        return Swap(max(stalls), moment.sampled, moment.delivered)

    async def _update_all(self, snapshot: Snapshot, note: Callable[[Worker], None]) -> list[float]:
        """Every server that is there; one that is away gets them when it is back, and holds up no other. Where all are
        away the first one is waited for."""
        while True:
            patient = len(self._workers) == 1
            stalls = await _all(worker.update(snapshot, note, patient=patient) for worker in self._workers)
            if done := [stall for stall in stalls if stall is not None]:
                return done
            await _first(worker.wait_up() for worker in self._workers)

    async def _release(self) -> Swap:
        moment = Moment(self._calls, lambda: self._delivered)
        self._calls.held_by.add(RELEASED)
        await asyncio.gather(*(worker.release(moment.note) for worker in self._workers))
        self._released = True
        self._attribute()
        return Swap(0.0, moment.sampled, moment.delivered)

    async def _drain(self) -> None:
        self._calls.held_by.add(DRAIN)
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._calls.idle.wait()
        except TimeoutError:
            self._calls.held_by.discard(DRAIN)
            raise WeightsError(
                f"{self._calls.pieces} requests did not end within {self._settings.drain_s:g} s, so that new weights "
                "could not be loaded: lower rollout.segment_tokens, or weights.in_flight = 'recompute'"
            ) from None

    def _pause(self, lease_s: float) -> None:
        if self._paused is None:
            self._paused = asyncio.Event()
            self._calls.held_by.add(PAUSE)
            self._task(self._hold(self._paused, lease_s), "pause")

    async def _hold(self, ends: asyncio.Event, lease_s: float) -> None:
        async with AsyncExitStack() as leases:
            for worker in self._workers:
                if worker.ready:
                    await leases.enter_async_context(PauseLease(worker.client, "retract", seconds=lease_s))
            self._attribute()
            with suppress(TimeoutError):
                async with asyncio.timeout(lease_s):
                    await ends.wait()
        self._paused = None
        self._calls.held_by.discard(PAUSE)
        self._calls.admit()

    def _resume(self) -> None:
        if self._paused is not None:
            self._paused.set()

    def _hand_over(self, chunks: list[Chunk]) -> None:
        self._delivered += len(chunks)
        self._deliver(chunks)

    def _step(self) -> None:
        self._stepped_at = time.monotonic()

    def _attribute(self) -> None:
        assert self._stopwatch is not None
        paused, running = self._paused is not None, self._calls.num_running > 0
        resting = "released" if self._released else "paused"
        otherwise = resting if paused or self._released else "engine_step" if running else "idle"
        self._stopwatch.switch("swap" if self._swapping else otherwise)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.create_task(work, name=name)

    def _close(self, error: BaseException | None) -> None:
        with self._gate:
            self._closed = error or _Stop()
        stopped = RuntimeError("the engine stopped before the weights were live")
        for load in list(self._loads):
            load.set_exception(error if isinstance(error, UserError) else stopped)
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


async def _all(updates: Iterable[Coroutine[Any, Any, float | None]]) -> list[float | None]:
    """Wait for every one of them; what failed first in order is raised when none is at work any more."""
    stalls = await asyncio.gather(*updates, return_exceptions=True)
    for stall in stalls:
        if isinstance(stall, BaseException):
            raise stall
    return [stall for stall in stalls if not isinstance(stall, BaseException)]


async def _first(waits: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Of several waits; the others are given up."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _copy(snapshot: Snapshot) -> Snapshot:
    return Snapshot(snapshot.weights, {name: tensor.clone() for name, tensor in snapshot.tensors.items()})


class _Stop(Exception):
    """Ends the engine's thread."""
