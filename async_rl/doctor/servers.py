"""Servers of `generator.sglang.attach`, and the router: they are asked what they are, and nothing in them changes."""

from __future__ import annotations

import asyncio

import aiohttp

from async_rl.config import Run
from async_rl.doctor.check import Check
from async_rl.engines.sglang.client import ServerError, SGLangClient
from async_rl.engines.sglang.keys import Keys, keys_of
from async_rl.engines.sglang.router import Router

ANSWER_S = 10.0


def servers(run: Run) -> list[Check]:
    """One check each; none where there is nothing to attach to. Raises UserError: a key is missing."""
    server = run.generator.sglang
    return asyncio.run(_ask(server.attach, server.router, keys_of(server))) if server.attach else []


async def _ask(attach: list[str], router: str, keys: Keys) -> list[Check]:
    async with aiohttp.ClientSession() as session:
        checks = [_server(SGLangClient(url, session, keys)) for url in attach]
        if router:
            checks.append(_router(Router(router, session, keys), attach))
        return await asyncio.gather(*checks)


async def _server(client: SGLangClient) -> Check:
    try:
        info = await client.info(ANSWER_S)
        await client.ask_admin(ANSWER_S)
    except ServerError as error:
        return Check("server", "FAIL", f"generator.sglang.attach = {client.url!r}: {error}")
    if info.untested:
        return Check("server", "warn", f"{client.url} {info.untested}")
    return Check("server", "ok", f"{client.url}: SGLang {info.version} on {info.device}, --tp-size {info.tp_size}")


async def _router(client: Router, attach: list[str]) -> Check:
    try:
        await client.be_there(ANSWER_S)
    except ServerError as error:
        return Check("server", "FAIL", f"generator.sglang.router = {client.url!r}: {error}")
    try:
        found = await client.lists_others(attach)
        others = f"it names its servers {', '.join(found)}; write these in generator.sglang.attach" if found else ""
    except ServerError as error:
        others = str(error)
    if others and len(attach) > 1:
        why = "so that all of them wait while one is away (docs/sglang.md)"
        return Check(
            "server", "warn", f"{client.url} answers, the router; a server cannot be taken out of it, {why}: {others}"
        )
    return Check("server", "ok", f"{client.url} answers, the router")
