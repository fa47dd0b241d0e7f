"""The admin endpoint: look at a run and steer it, over HTTP. Who may is admin_access.py's.

GET  /                          a live dashboard (controller.dashboard)
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
from async_rl.controller.dashboard import Dashboard
from async_rl.listening import bracketed, listen
from async_rl.telemetry.exposition import CONTENT_TYPE, exposition
from async_rl.telemetry.feed import Feed

CONTROLLER = web.AppKey("controller", Controller)
NAME = web.AppKey("name", str)


async def start(
    controller: Controller, host: str, port: int, access: Access, *, feed: Feed | None = None, name: str = ""
) -> tuple[web.AppRunner, str]:
    """Serve until `runner.cleanup()`. Returns the runner and the URL.

    Args:
        feed: hears what the controller's journal tells; without it there is no dashboard.
        name: of the run.

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
    if feed is not None:
        dashboard = Dashboard(controller, feed, name)
        app.add_routes(dashboard.routes())
        app.on_shutdown.append(dashboard.close)
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
    if not request.app[CONTROLLER].run_config.evaluation.tasks:
        reason = "evaluation.tasks = 0: there is nothing to evaluate; write how many held-out tasks there are to be"
        return web.json_response({"error": reason}, status=409)
    summary = await request.app[CONTROLLER].evaluate()
    return web.json_response({"version": summary.version, "reward": summary.reward, **summary.metrics})


async def _stop(request: web.Request) -> web.Response:
    request.app[CONTROLLER].stop()
    return web.json_response({"stopping": True})
