"""The admin endpoint: look at a run and steer it, over HTTP on loopback.

GET  /status                    where the run is, who works and who waits
POST /pause   POST /resume      stop and reopen admission; what runs goes on
POST /evaluate                  evaluate the weights of now, answer with the result
POST /stop                      stop so that the next start continues
"""

from __future__ import annotations

from aiohttp import web

from async_rl.controller.controller import Controller
from async_rl.errors import UserError

CONTROLLER = web.AppKey("controller", Controller)


async def start(controller: Controller, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Serve until `runner.cleanup()`. Returns the runner and the URL.

    Raises:
        UserError: the port is taken.
    """
    app = web.Application()
    app[CONTROLLER] = controller
    app.add_routes(
        [
            web.get("/status", _status),
            web.post("/pause", _pause),
            web.post("/resume", _resume),
            web.post("/evaluate", _evaluate),
            web.post("/stop", _stop),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise UserError(
            f"controller.admin_port = {port}: cannot listen on {host} ({error.strerror}); write a free port, or 0"
        ) from None
    address = runner.addresses[0]
    return runner, f"http://{address[0]}:{address[1]}"


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[CONTROLLER].status())


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
