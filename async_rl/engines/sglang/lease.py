"""A pause of a server is a lease: it is given back in `finally`, and at its deadline whatever its holder does.

async with PauseLease(client, "retract", seconds=30) as lease:
    lease.soil()            # from here on the server's weights are neither old nor new: nothing may resume it
    ...
    lease.clean()
print(lease.held_s)
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType

from async_rl.engines.sglang.client import PauseMode, ServerError, SGLangClient
from async_rl.weights.errors import WeightsError

RESUME_TRIES = 3
log = logging.getLogger(__name__)


class LeaseExpired(WeightsError):
    """The server was resumed at the deadline of a pause, before its holder had loaded anything."""


class PauseLease:
    """While any is held the server samples nothing; leases of one client nest. A dirty one outlives its deadline, and
    its end: the server stays paused, because what it would sample with has no version."""

    def __init__(self, client: SGLangClient, mode: PauseMode, *, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        self._mode: PauseMode = mode
        self._watch: asyncio.Task[None] | None = None
        self._since = 0.0
        self.dirty = False
        self.expired = False
        self.held_s = 0.0
        """How long it was held, once it is over."""

    async def __aenter__(self) -> PauseLease:
        self._since = time.monotonic()
        self._watch = asyncio.create_task(self._expire(), name=f"pause of {self._client.url}")
        self._client.pauses += 1
        try:
            await self._client.pause(self._mode)
        except BaseException:
            await self._release()  # it may have paused without telling us
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._release()

    def clean(self) -> None:
        """All weights are there."""
        self.dirty = self._client.empty = False

    def soil(self) -> None:
        """The next call may change weights. Buckets that reach a server at work would give it half of them.

        Raises:
            LeaseExpired: it was resumed at the deadline.
        """
        if self.expired:
            raise LeaseExpired(
                f"SGLang server {self._client.url} was resumed after {self._seconds:g} s of pause "
                "(generator.sglang.pause_s): no weights were loaded yet"
            )
        self.dirty = True

    async def _release(self) -> None:
        assert self._watch is not None
        if self.expired:
            await self._watch
        else:
            self._watch.cancel()
            self._client.pauses -= 1
            if not self.dirty:
                await asyncio.shield(self._resume())
        self.held_s = time.monotonic() - self._since

    async def _expire(self) -> None:
        await asyncio.sleep(self._seconds)
        if self.dirty or self._client.empty:
            log.warning("%s: a pause outlives its %g s, the weights are not all there", self._client.url, self._seconds)
            return
        self.expired = True
        self._client.pauses -= 1
        log.warning("%s: a pause reached its deadline of %g s and ends", self._client.url, self._seconds)
        await self._resume()

    async def _resume(self) -> None:
        """A server that stays paused is worse than an error, so it is asked more than once."""
        if self._client.pauses > 0 or self._client.empty:
            return  # others still hold it, or there is nothing to sample with
        for attempt in range(RESUME_TRIES):
            try:
                await self._client.resume()
                return
            except ServerError as error:
                log.warning("%s (try %d of %d)", error, attempt + 1, RESUME_TRIES)
