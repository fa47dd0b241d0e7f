"""The admin endpoint: look at a run and steer it, over HTTP. Who may is admin_access.py's.

GET  /metrics                   the same as Prometheus reads it (docs/monitoring.md)
GET  /status                    where the run is, who works and who waits
POST /pause   POST /resume      stop and reopen admission; what runs goes on
POST /evaluate                  evaluate the weights of now, answer with the result
POST /stop                      stop so that the next start continues
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from async_rl.controller.admin_access import Access
from async_rl.controller.controller import Controller
from async_rl.listening import bracketed, listen
from async_rl.telemetry.exposition import CONTENT_TYPE, exposition

CONTROLLER = web.AppKey("controller", Controller)
NAME = web.AppKey("name", str)


async def start(
    controller: Controller, host: str, port: int, access: Access, *, name: str = ""
) -> tuple[web.AppRunner, str]:
    """Serve until `runner.cleanup()`. Returns the runner and the URL. name: of the run.

    Raises:
        UserError: the address is not ours, or the port is taken.
    """
    listener = listen(host, port, field="controller.host", owner="controller", port_field="controller.admin_port")
    app = web.Application(middlewares=[access.check])
    app[CONTROLLER], app[NAME] = controller, name
    app.add_routes(
        [
            web.get("/status", _status),
            web.get("/metrics", _metrics),
            web.post("/pause", _pause),
            web.post("/resume", _resume),
            web.post("/evaluate", _evaluate),
            web.post("/stop", _stop),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    address, port, *_ = runner.addresses[0]
    return runner, f"http://{bracketed(address)}:{port}"


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[CONTROLLER].status())


async def _metrics(request: web.Request) -> web.Response:
    """Read here, written in a thread: with a thousand generators, writing takes 50 ms."""
    page = await asyncio.to_thread(exposition, request.app[CONTROLLER].reading(request.app[NAME]))
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})


async def _pause(request: web.Request) -> web.Response:
    request.app[CONTROLLER].pause(True)
    return web.json_response({"paused": True})


async def _resume(request: web.Request) -> web.Response:
    request.app[CONTROLLER].pause(False)
    return web.json_response({"paused": False})


async def _evaluate(request: web.Request) -> web.Response:
    summary = await request.app[CONTROLLER].evaluate()
    return web.json_response({"version": summary.version, "reward": summary.reward, **summary.metrics})


async def _stop(request: web.Request) -> web.Response:
    request.app[CONTROLLER].stop()
    return web.json_response({"stopping": True})
