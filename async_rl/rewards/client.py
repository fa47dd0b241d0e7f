"""A reward service (service.py) in the place of graders of one's own, where the recipe has `rewards.service`.

A service that is away, silent or full is asked again for PATIENCE_S; then there is no verdict. A job has no effect but
its verdict, so asking twice does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import urllib.error
import urllib.request

import aiohttp
import msgspec

from async_rl.config import Rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards.jobs import Asked, Compare, FromChild, Kind, RunProgram, from_child

SILENT_S = 30.0
"""Without a byte the service is taken for dead."""
PATIENCE_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
STATUS_S = 10.0
OK, FULL = 200, 503


def token_of(settings: Rewards) -> str:
    """Empty: there is none. Raises UserError: the variable is not set, or holds no token."""
    variable = settings.service_token_env
    token = os.environ.get(variable, "").strip() if variable else ""
    if variable and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            f"rewards.service_token_env = {variable!r}: there is no such environment variable, or it holds no token; "
            "set it to printable ASCII without spaces, the same for the service and for those who ask it"
        )
    return token


class Client:
    """One connection pool per event loop; `close` it there."""

    def __init__(self, settings: Rewards) -> None:
        self._url = settings.service.rstrip("/")
        token = token_of(settings)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=STATUS_S, sock_read=SILENT_S),
        )

    async def grade(self, kind: Kind, job: Compare | RunProgram, deadline_s: float) -> FromChild:
        """
        Raises:
            GradingFailed: the service was away, silent or full for too long.
            UserError: it refuses us.
        """
        body = msgspec.msgpack.encode(Asked(job, deadline_s))
        loop = asyncio.get_running_loop()
        there, pause = loop.time(), FIRST_PAUSE_S
        while True:
            try:
                async with self._session.post(f"{self._url}/grade/{kind}", data=body) as response:
                    if response.status == OK:
                        try:
                            return from_child.decode((await response.read()).lstrip(b"\0"))
                        finally:
                            there, pause = loop.time(), FIRST_PAUSE_S
                    reason = f"{response.status} {(await response.text()).strip()[:200]}"
                if response.status != FULL:
                    raise UserError(f"rewards.service = {self._url!r}: it answers {reason}")
            except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
                reason = str(error) or f"it was silent for {SILENT_S:.0f} s"
            if loop.time() - there > PATIENCE_S:
                raise GradingFailed(f"the reward service {self._url} gave no verdict for {PATIENCE_S:.0f} s: {reason}")
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_S, 2 * pause)

    async def close(self) -> None:
        await self._session.close()


def require(settings: Rewards, kind: Kind) -> None:
    """Whether the service is there and grades such jobs. Raises UserError."""
    token = token_of(settings)
    request = urllib.request.Request(f"{settings.service.rstrip('/')}/status")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.closing(direct.open(request, timeout=STATUS_S)) as answer:
            found = json.load(answer)["graders"][kind]
    except urllib.error.HTTPError as error:
        found = f"it answers {error.code}" + (", another token is wanted" if error.code == 401 else "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"no reward service answers there ({error})"
    if found != "ok":
        raise UserError(
            f"rewards.service = {settings.service!r}: {found}; start `async-rl serve reward` there, or leave this out"
        )
