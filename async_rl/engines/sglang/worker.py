"""One server as the engine uses it: started or attached, watched, brought to the engine's weights, started again.

    down --(it answers)--> up --(weights loaded)--> ready
     ^                                               |
     +------(it exits, or answers no more)-----------+

Where the device is shared it is `down` until weights are to be loaded: a server takes the device when it starts.

A server is asked every PROBE_S how it is, because it tells nobody: whether it lives, what it holds, how busy it is. One
that somebody else has paused is resumed, and the log says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang.attaching import attach
from async_rl.engines.sglang.client import Load, ServerError, ServerGone, ServerRefused, SGLangClient
from async_rl.engines.sglang.contract import ASLEEP, EMPTY, parse_version, version_name
from async_rl.engines.sglang.router import Place
from async_rl.engines.sglang.server import ServerFailed, ServerProcess
from async_rl.engines.sglang.update import ServerBroken, ServerWeights
from async_rl.errors import UserError
from async_rl.weights.errors import WeightsError
from async_rl.wire.messages import WeightsId

PROBE_S = 2.0
PROBE_ANSWER_S = 10.0
LOST_PROBES = 3
"""So many in a row without an answer: it is gone, or hangs."""
SUSPECT_S = 0.2
UPDATE_TRIES = 3
CLOSE_S = 2.0
"""What an attached server is told at the end is for tidiness alone."""
MAX_RESTARTS = 3
"""In a row, without a finished piece in between."""
log = logging.getLogger(__name__)


class Worker:
    """Everything happens on the engine's loop; `tend` runs as long as the engine does."""

    def __init__(
        self,
        make_client: Callable[[str], SGLangClient],
        make_weights: Callable[[SGLangClient], ServerWeights],
        *,
        process: ServerProcess | None,
        url: str = "",
        start_s: float,
        stuck_s: float,
        max_input: int,
        place: Place | None = None,
        others_work: Callable[[], bool] = lambda: False,
        off_device: bool = False,
        owner: str,
        news: Callable[[], None],
        hangs: Callable[[Worker], None] = lambda _: None,
    ) -> None:
        """process: the server to start; None attaches to `url`. max_input: tokens of prompt it must take. stuck_s: so
        long may somebody else pause it. place: in the router it is attached behind. others_work: whether requests go on
        while it is away. off_device: the device is somebody else's until the first weights. owner: whose weights it is
        to hold. news: called when something may begin that could not. hangs: called where it is lost, and has not even
        closed its connections."""
        self._make_client, self._make_weights, self._process = make_client, make_weights, process
        self._owner = owner
        self._start_s, self._stuck_s, self._max_input, self._news = start_s, stuck_s, max_input, news
        self._place, self._others_work, self._hangs = place, others_work, hangs
        self.client = make_client(url)
        self._weights = make_weights(self.client)
        self._up = asyncio.Event()
        self._lock = asyncio.Lock()
        self._suspected = asyncio.Event()
        self._lost = ""
        """Why it must be given up."""
        self._silent = False
        """It took the last call that broke off, and said nothing."""
        self._doubted = False
        """It sampled with weights that are not ours, and was not looked at since."""
        self._target: Snapshot | None = None
        self._refusals = 0
        """Of weights that it is to catch up on, in a row."""
        self._on_device = asyncio.Event()
        """Else it is off it until the next weights, whatever happens to the server meanwhile."""
        if not off_device:
            self._on_device.set()
        self._runs = False
        """It is up, or about to be: it may hold memory there."""
        self.held: WeightsId | None = None
        """What it samples with, as far as we loaded it."""
        self.pieces = 0
        """Pieces that were sent to it; with a router they may be elsewhere."""
        self._paused_at: float | None = None
        """Since when it has been found paused, and not by us."""
        self.restarts = 0
        """In a row."""
        self.restarted = 0
        """In all."""
        self.foreign_pauses = 0
        self.load: Load | None = None

    @property
    def out(self) -> bool:
        """There is a router, and it passes nothing to this server."""
        return self._place is not None and self._place.out

    @property
    def ready(self) -> bool:
        return self._up.is_set() and self.held is not None and not self._lock.locked() and not self._doubted

    @property
    def reloads(self) -> int:
        """Failed updates that were mended from disk."""
        return self._weights.reloads

    def suspect(self) -> None:
        """A call broke off: look at it now."""
        self._suspected.set()

    def doubt(self) -> None:
        """It sampled with weights that are not ours: nothing begins there before a look at what it holds."""
        self._doubted = True
        self.suspect()

    async def tend(self) -> None:
        """Raises UserError where it never was there, ServerFailed where it does not come back, or keeps dying."""
        async with asyncio.TaskGroup() as self._tasks:
            while True:
                if self._process is not None:
                    await self._on_device.wait()
                self._runs = True
                try:
                    await self._start()
                    why = await self._serve()
                except ServerFailed as error:
                    if self.restarted:
                        raise
                    raise UserError(f"generator.sglang: {error}") from None
                except ServerGone as error:
                    why = str(error)
                if self._process is not None:
                    self._process.kill()
                    await self._process.wait_exit()
                self._runs, self.held = self._process is None, None
                self.restarts += 1
                self.restarted += 1
                log.warning("SGLang server %s is gone (%s); %s", self.client.url, why, self._what_now())
                if self._place is not None:
                    await self._place.leave()
                    self._news()
                if self._silent:
                    self._hangs(self)
                if self.restarts > MAX_RESTARTS:
                    raise ServerFailed(
                        f"the SGLang server was lost {self.restarts} times in a row, last by {why}"
                        + (self._process.see_log() if self._process else f": look at {self.client.url}")
                    )

    async def _serve(self) -> str:
        """Until it is gone; why, in words."""
        self._lost = ""
        if self._place is not None and self.out:
            await self._place.leave()  # the router may have been told before to put it in as soon as it answers
        if not self._on_device.is_set():
            await self._leave()  # it came, or came back, in somebody else's turn
        if not self._lost:
            self._up.set()
        self._catch_up()
        try:
            return await self._watch()
        finally:
            self._up.clear()

    def _catch_up(self) -> None:
        """Bring it to the newest weights, while it is being watched. If it refuses, the next look at it tries again."""

        async def catch_up() -> None:
            if self._target is None or not self._on_device.is_set() or self.client.empty:
                return  # what has no memory takes it when it is told to
            try:
                await self.update(self._target)
            except (ServerRefused, WeightsError) as error:
                self._refusals += 1
                log.warning("SGLang server %s does not get the weights it lacks: %s", self.client.url, error)
                if self._refusals >= UPDATE_TRIES:
                    self._give_up(str(error))
            else:
                self._refusals = 0
                self._news()

        self._tasks.create_task(catch_up(), name=f"weights of {self.client.url}")

    async def update(
        self, snapshot: Snapshot, swapped: Callable[[Worker], None] = lambda _: None, *, patient: bool = False
    ) -> float | None:
        """Bring it to these weights, after a restart again. Returns how long it stood still; None: it is away, and gets
        them when it is back.

        swapped: called when they are loaded, before it goes on.
        patient: wait for it instead.

        Raises:
            ServerBroken: a server that we did not start holds half-loaded weights.
            ServerRefused, WeightsError: it holds what it held before.
        """
        before, self._target = self._target, snapshot
        broken_off = 0
        async with self._lock:
            self._on_device.set()
            while self.held != snapshot.weights:
                if not patient and not self._up.is_set():
                    return None
                await self.wait_up()
                try:
                    await self._wake()
                    lease = await self._weights.load(snapshot, lambda: swapped(self), anew=self.held is None)
                except ServerBroken as error:
                    if self._process is None:
                        raise
                    self._give_up(str(error))
                except ServerGone as error:
                    broken_off += 1
                    if broken_off > UPDATE_TRIES or not await self._answers():
                        self._give_up(str(error))
                    else:
                        log.warning("%s: once more", error)
                except Exception:
                    self._target = before
                    raise
                else:
                    self.held, self._doubted = snapshot.weights, False
                    if self.out:
                        self.suspect()  # that look puts it into the router again
                    return lease.held_s
        return 0.0

    async def release(self, stopped: Callable[[Worker], None]) -> None:
        """Leave the device until the next weights. stopped: called when nothing is sampled any more.

        Raises:
            ServerRefused: it will not.
        """
        async with self._lock:
            if not self._on_device.is_set():
                return
            self._on_device.clear()
            self.held = None
            if not self._runs:
                stopped(self)
                return
            await self.wait_up()
            await self._leave(stopped)

    async def _leave(self, stopped: Callable[[Worker], None] = lambda _: None) -> None:
        """It names itself before it gives its memory back: if we die in between, nobody loads into nothing."""
        try:
            self.client.empty = True  # a pause that no deadline ends
            await self.client.pause("retract")
            stopped(self)
            if await self.client.weight_version() != ASLEEP:
                await self.client.name_weights(ASLEEP)
                await self.client.release_memory()
        except ServerGone as error:
            self._give_up(str(error))  # what is dead has left the device

    async def _wake(self) -> None:
        """It takes its memory again, unless it was started anew meanwhile: then it never gave it back."""
        if not self.client.empty:
            return
        found = await self.client.weight_version()
        if found == ASLEEP:
            await self.client.take_memory()
            await self.client.name_weights(EMPTY)
        elif found != EMPTY:
            self.client.empty = False

    async def close(self) -> None:
        if self._process is not None:
            await self._process.stop()
            return
        with contextlib.suppress(TimeoutError):  # it, or the router, may hang
            async with asyncio.timeout(CLOSE_S):
                if self._place is not None:
                    await self._place.close()
                if self._up.is_set():
                    await self._weights.close()

    async def _start(self) -> None:
        self._doubted = False
        self._refusals = 0
        if self._process is not None:
            await self._process.start()
            self.client = self._make_client(self._process.url)
            self._weights = self._make_weights(self.client)
            await self._process.wait_ready(self.client, self._start_s)
        else:
            again, others = self.restarted > 0, self._others_work
            await attach(self.client, self._place, start_s=self._start_s, again=again, others_work=others)
        self.client.empty = await self.client.weight_version() in (ASLEEP, EMPTY)
        info = await self.client.info()
        if info.untested:
            log.warning("SGLang server %s %s", self.client.url, info.untested)
        if info.max_input < self._max_input:
            raise ServerFailed(
                f"SGLang server {self.client.url} takes prompts of {info.max_input} tokens, this recipe needs "
                f"{self._max_input}: lower generator.max_length, or start it with a larger --context-length and "
                "--max-total-tokens"
            )
        if info.dp_size > 1:
            raise ServerFailed(
                f"SGLang server {self.client.url} runs with --dp-size {info.dp_size}: weights reach one replica only; "
                "start as many servers and name them all in generator.sglang.attach"
            )

    async def wait_up(self) -> None:
        """Raises ServerFailed."""
        try:
            async with asyncio.timeout(self._start_s + PROBE_ANSWER_S):
                await self._up.wait()
        except TimeoutError:
            raise ServerFailed(f"SGLang server {self.client.url} did not come back") from None

    async def _answers(self) -> bool:
        """A call that broke off need not mean that the server is gone."""
        try:
            await self.client.info(PROBE_ANSWER_S)
        except ServerError:
            return False
        return True

    def _give_up(self, why: str) -> None:
        """It will not do as it is: `tend` starts it again, or waits for it to come back."""
        self._lost = why
        self._up.clear()
        self.held = None
        self._suspected.set()

    async def _watch(self) -> str:
        """Until it is gone; why, in words."""
        exited = asyncio.create_task(self._process.wait_exit()) if self._process is not None else None
        silent = 0
        try:
            while not self._lost and silent < LOST_PROBES:
                if exited is not None and exited.done():
                    return exited.result()
                silent = 0 if await self._probe() else silent + 1
                await self._pause_between_probes(exited)
        finally:
            if exited is not None:
                exited.cancel()
        return self._lost or "no answer"

    async def _pause_between_probes(self, exited: asyncio.Task[str] | None) -> None:
        suspected = asyncio.create_task(self._suspected.wait())
        waits: list[asyncio.Task[Any]] = [suspected] if exited is None else [suspected, exited]
        try:
            await asyncio.wait(waits, timeout=PROBE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            suspected.cancel()
        if self._suspected.is_set() and exited is not None and not exited.done():
            await asyncio.wait([exited], timeout=SUSPECT_S)  # whoever breaks off a call may be about to exit
        self._suspected.clear()

    async def _probe(self) -> bool:
        """Look at it once. False: no answer."""
        try:
            self.load = await self.client.load(PROBE_ANSWER_S)
            if not self._lock.locked():
                doubted = self._doubted
                if self._refusals:
                    self._catch_up()
                await self._check_version()
                if doubted:
                    self._doubted = False
                    self._news()
            await self._end_foreign_pause()
            if self._place is not None and self.out and self.ready:
                await self._place.join()
                self._news()
        except ServerError as error:
            log.warning("%s", error)
            self._silent = isinstance(error.__cause__, TimeoutError)
            return False
        self._silent = False
        return True

    async def _check_version(self) -> None:
        """Somebody else may have loaded other weights, or started the server anew."""
        held = self.held
        if held is None:
            return
        found = await self.client.weight_version()
        if found != version_name(self._owner, held) and self.held == held and not self._lock.locked():
            log.warning("SGLang server %s holds weights %s, not ours: they are loaded again", self.client.url, found)
            self._yield_to(found)
            self.held = None
            self._catch_up()

    def _yield_to(self, version: str) -> None:
        """Of two engines that load their weights into one server, the one that came later ends.

        Raises:
            UserError: that is us.
        """
        parsed = parse_version(version)
        if parsed is None:
            return
        if parsed[0] < self._owner and self._process is None:
            raise UserError(
                f"generator.sglang.attach: another run of async_rl loads its weights into {self.client.url}, and was "
                "there first; write a server that no other run uses"
            )
        log.warning("they are of another run of async_rl, which came later and has to use another server")

    async def _end_foreign_pause(self) -> None:
        """One that lacks our weights is not resumed: loading them does that. To resume one that is not paused but only
        calls itself unhealthy does nothing."""
        theirs = not await self.client.takes_requests(PROBE_ANSWER_S)
        ours = self.client.pauses or self.client.empty or self.held is None or self._lock.locked()
        if not theirs or ours:
            self._paused_at = None
            return
        now = time.monotonic()
        self._paused_at = self._paused_at or now
        if now - self._paused_at >= self._stuck_s:
            self.foreign_pauses += 1
            log.warning(
                "SGLang server %s took no requests for %.0f s: resumed, as if somebody had paused it",
                self.client.url,
                now - self._paused_at,
            )
            self._paused_at = None
            await self.client.resume()

    def _what_now(self) -> str:
        return "it is started again" if self._process is not None else "waiting for it to come back"
