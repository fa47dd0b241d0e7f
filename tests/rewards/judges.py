"""An endpoint of OpenAI's kind that says what a test wants it to say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Says = Callable[[str], str | web.Response]


@asynccontextmanager
async def endpoint(says: Says) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL, and the requests that came."""
    came: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        came.append({**body, "authorization": request.headers.get("Authorization")})
        answer = says(body["messages"][0]["content"])
        if isinstance(answer, web.Response):
            return answer
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": answer}}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", complete)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", came
    finally:
        await runner.cleanup()
