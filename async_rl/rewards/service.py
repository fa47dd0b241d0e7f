"""Graders for environments on other machines, over HTTP: what `async-rl serve reward` serves.

    POST /grade/math   POST /grade/code    Asked (jobs.py), as msgpack -> Verdict | Refused
    GET  /status                           {"graders": {"math": "ok", "code": "bubblewrap is not ..."}, "waiting": 3}

While a job waits or runs, the answer trickles: a zero byte every few seconds says that the service is alive. A service
that is full answers 503. Who goes away takes the job along.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
from aiohttp import web

from async_rl.config import Rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.listening import bracketed, is_loopback, listen
from async_rl.rewards.client import token_of
from async_rl.rewards.jobs import MAX_FRAME, Asked, Compare, FromChild, Kind, Refused, RunProgram, Verdict, asked

BEAT_S = 5.0
MAX_WAITING = 4096
TYPE = "application/msgpack"

Grade = Callable[[Compare | RunProgram, float], Awaitable[Verdict]]
"""(job, its deadline in seconds) -> verdict."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """Serves from `start` to `close`.

    Args:
        grade: by kind.
        missing: why the other kinds cannot be graded here.
    """

    def __init__(self, settings: Rewards, grade: dict[Kind, Grade], missing: dict[Kind, str]) -> None:
        self._settings, self._grade, self._missing = settings, grade, missing
        self._token = token_of(settings)
        self._waiting = 0
        self._runner: web.AppRunner
        self.url = ""

    async def start(self) -> None:
        """Raises UserError: the address is not ours, the port is taken, or others reach it and there is no token."""
        host = self._settings.host
        if not is_loopback(host) and not self._token:
            raise UserError(
                f"rewards.host = {host!r}: whoever reaches it could run programs there; set rewards.service_token_env "
                "to the name of an environment variable that holds a token"
            )
        listener = listen(host, self._settings.port, field="rewards.host", owner="service", port_field="rewards.port")
        app = web.Application(middlewares=[self._authorised], client_max_size=MAX_FRAME)
        app.add_routes([web.post("/grade/{kind}", self._graded), web.get("/status", self._status)])
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()
        address, port, *_ = self._runner.addresses[0]
        self.url = f"http://{bracketed(address)}:{port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            body = {"error": "send the token that rewards.service_token_env names as a bearer token"}
            return web.json_response(body, status=401, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def _status(self, request: web.Request) -> web.Response:
        graders = {kind: self._missing.get(kind, "ok") for kind in ("math", "code")}
        return web.json_response({"graders": graders, "waiting": self._waiting})

    async def _graded(self, request: web.Request) -> web.StreamResponse:
        kind = cast(Kind, request.match_info["kind"])
        grade = self._grade.get(kind)
        try:
            wanted = asked.decode(await request.read())
        except msgspec.DecodeError as error:
            raise web.HTTPBadRequest(text=f"this is no job: {error}\n") from None
        if self._waiting >= MAX_WAITING:
            raise web.HTTPServiceUnavailable(text=f"{MAX_WAITING} jobs are here already\n")
        response = web.StreamResponse(headers={"Content-Type": TYPE})
        await response.prepare(request)
        self._waiting += 1
        grading = asyncio.ensure_future(_verdict(grade, wanted, self._missing.get(kind, f"there is no {kind!r}")))
        try:
            while not (await asyncio.wait([grading], timeout=BEAT_S))[0]:
                await response.write(b"\0")
        finally:
            self._waiting -= 1
            grading.cancel()
        await response.write_eof(msgspec.msgpack.encode(grading.result()))
        return response


async def _verdict(grade: Grade | None, wanted: Asked, missing: str) -> FromChild:
    if grade is None:
        return Refused(f"the reward service cannot grade this: {missing}", of_the_user=True)
    try:
        return await grade(wanted.job, wanted.deadline_s)
    except (GradingFailed, UserError) as error:
        return Refused(str(error), of_the_user=isinstance(error, UserError))
