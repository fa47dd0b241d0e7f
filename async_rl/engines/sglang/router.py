"""A sglang-router in front of the servers of `attach`: requests go to it, and it knows no difference between them.

So a server that is away, or is back and lacks our weights, is taken out of it, and the others work on; it is put in
again when it holds them. As of sglang-router 0.3.2: GET /workers lists them, DELETE /workers/<id> works within
milliseconds and breaks nothing off, POST /workers takes a second, for the router asks the server what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import aiohttp

from async_rl.engines.sglang.client import API_KEY, NO_KEYS, ServerError, ServerGone, ServerRefused, SGLangClient
from async_rl.engines.sglang.keys import Keys

LOOK_S = 0.1
"""Between two looks at whether it has done what it was told."""
DONE_S = 10.0
log = logging.getLogger(__name__)
KEPT = ("model_id", "priority", "cost")
"""What a server has in the router that it cannot find out, and has again when it is put in."""


class Router(SGLangClient):
    """Made and used on one event loop."""

    kind = "router"

    def __init__(self, url: str, session: aiohttp.ClientSession, keys: Keys = NO_KEYS, *, servers: int = 1) -> None:
        """keys: it gets the key of requests for everything. servers: how many are behind it, as `attach` names them."""
        super().__init__(url, session, Keys(keys.api, keys.api))
        self._fields = (API_KEY, API_KEY)
        self._servers, self._key = servers, keys.api
        self._taken_out: dict[str, dict[str, Any]] = {}

    async def be_there(self, timeout_s: float) -> None:
        """Whatever it answers. Raises ServerGone."""
        with contextlib.suppress(ServerRefused):
            await self._get("health", timeout_s)

    async def lacks(self, url: str) -> bool:
        """Somebody took it out, and did not live to put it in again.

        Raises:
            ServerGone
        """
        try:
            listed = await self._workers()
        except ServerRefused:
            return False
        return url not in listed and len(listed) < self._servers

    async def take_out(self, url: str) -> bool:
        """Whether it passes no request to this server any more: not where it is the only one, which would help nobody.

        Raises:
            ServerGone, ServerRefused: there is no telling what it does.
        """
        if self._servers < 2:
            return False
        listed = await self._workers()
        if (found := listed.get(url)) is None:
            if len(listed) < self._servers:
                return True
            raise ServerRefused(f"SGLang router {self.url} lists no worker {url}, but {', '.join(sorted(listed))}")
        self._taken_out[url] = {name: found[name] for name in KEPT if name in found}
        await self._call("DELETE", f"workers/{found['id']}", None, DONE_S)
        await self._until(url, there=False)
        return True

    async def tell_to_put_in(self, url: str) -> None:
        """It will, once the server answers. Raises ServerGone, ServerRefused."""
        key = {"api_key": self._key} if self._key else {}
        await self._post("workers", {"url": url} | self._taken_out.get(url, {}) | key, DONE_S)

    async def put_in(self, url: str) -> None:
        """Requests may reach this server when this returns. Raises ServerGone, ServerRefused."""
        await self.tell_to_put_in(url)
        await self._until(url, there=True)

    async def _workers(self) -> dict[str, dict[str, Any]]:
        """By URL."""
        found: list[dict[str, Any]] = (await self._get("workers", DONE_S)).get("workers") or []
        return {str(worker["url"]).rstrip("/"): worker for worker in found}

    async def _until(self, url: str, *, there: bool) -> None:
        """It does such things in the background, and tells nobody when."""
        try:
            async with asyncio.timeout(DONE_S):
                while True:
                    if (url in await self._workers()) == there:
                        return
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            done = "put in" if there else "taken out"
            raise ServerGone(f"SGLang router {self.url}: {url} was not {done} within {DONE_S:.0f} s") from None

    async def lists_others(self, urls: Iterable[str]) -> list[str]:
        """What it calls its servers, where these are not among them. Raises ServerGone, ServerRefused."""
        listed = await self._workers()
        return [] if all(url.rstrip("/") in listed for url in urls) else sorted(listed)


class Place:
    """Of one server in the router."""

    def __init__(self, router: Router, url: str) -> None:
        self.router, self._url = router, url.rstrip("/")
        self.out = False
        """The router passes nothing to it."""

    async def look(self) -> None:
        """At whether somebody took it out before us. Raises ServerGone."""
        self.out = self.out or await self.router.lacks(self._url)

    async def leave(self) -> None:
        try:
            self.out = await self.router.take_out(self._url)
        except ServerError as error:
            self.out = False
            log.warning("%s: nothing begins until SGLang server %s is back", error, self._url)

    async def join(self) -> None:
        try:
            await self.router.put_in(self._url)
        except ServerError as error:
            log.warning("%s: the next look at SGLang server %s tries again", error, self._url)
        else:
            self.out = False

    async def close(self) -> None:
        """Whoever comes next finds it in the router as soon as it answers."""
        if self.out:
            with contextlib.suppress(ServerError):
                await self.router.tell_to_put_in(self._url)
