"""The learner's weights over HTTP: for generators that join late, or are outside the weight group's network.

GET /weights          what there is: {"files": [{"name", "weights", "base", "bytes"}, ...]}; deltas in the order in
                      which they apply, then the newest whole set
GET /weights/<name>   a safetensors file (weight_file.py); ranges, ETag; 404 once it is too old

Every request carries the bearer token of the announcement. The files are those of files.py: the kernel copies from them
into the socket, and a file that is being sent is not written again.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from async_rl.listening import listen
from async_rl.weights.files import WeightFile
from async_rl.weights.slots import Held, hold

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 1.0
"""How long `close` lets a transfer in progress go on."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Relay:
    """Serves until `close`, in a thread of its own.

    Args:
        shelf: what there is now; called for each request.

    Raises:
        UserError: the address is not ours, or the port is taken.
    """

    def __init__(self, shelf: Callable[[], Sequence[WeightFile]], host: str, port: int = 0) -> None:
        self._shelf = shelf
        self._listener = listen(host, port, field="weights.host", owner="learner", port_field="weights.relay_port")
        self.token = secrets.token_urlsafe(24)
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner
        self._thread = threading.Thread(target=self._loop.run_forever, name="weights-relay", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_TIMEOUT_S)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(STOP_TIMEOUT_S + START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._authorised])
        app.add_routes([web.get("/weights", self._index), web.get("/weights/{name}", self._file)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_TIMEOUT_S)
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener).start()
        host, port, *_ = self._runner.addresses[0]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _stop(self) -> None:
        server = self._runner.server
        transports = [] if server is None else [connection.transport for connection in server.connections]
        await self._runner.cleanup()
        for transport in transports:
            if transport is not None:
                transport.abort()  # one whose reader has stopped reading would never be closed
        await asyncio.sleep(0)  # they close in the next turn of the loop

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            body = {"error": "send the bearer token of the weights announcement, which comes over the rollout stream"}
            return web.json_response(body, status=401, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def _index(self, request: web.Request) -> web.Response:
        files = [
            {"name": file.path.name, "weights": file.header.weights, "base": file.base, "bytes": file.nbytes}
            for file in self._shelf()
        ]
        return web.Response(body=msgspec.json.encode({"files": files}), content_type="application/json")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        wanted = request.match_info["name"]
        found = next((file for file in self._shelf() if file.path.name == wanted), None)
        held = None if found is None else hold(found.path)
        if found is None or held is None:
            raise web.HTTPNotFound(text=f"{wanted} is not here (any more): GET /weights lists what is\n")
        return _Sent(found.path, held)


class _Sent(web.FileResponse):
    """Holds its file while it is sent."""

    def __init__(self, path: Path, held: Held) -> None:
        super().__init__(path)
        self._held = held

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """aiohttp sends the whole body in here."""
        try:
            return await super().prepare(request)
        finally:
            self._held.close()
