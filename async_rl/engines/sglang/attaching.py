"""Waiting for a server that runs already, and for the router in front of it: nobody tells us when they are up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from async_rl.engines.sglang.client import ServerError, ServerRefused, SGLangClient
from async_rl.engines.sglang.router import Place
from async_rl.engines.sglang.server import ServerFailed
from async_rl.errors import UserError

ASK_S = 2.0
"""Between two questions."""
ANSWER_S = 10.0
log = logging.getLogger(__name__)


async def attach(
    client: SGLangClient, place: Place | None, *, start_s: float, again: bool, others_work: Callable[[], bool]
) -> None:
    """They answer when this returns.

    again: this server was there before. others_work: whether requests go on without it.

    Raises:
        UserError: nothing ever answered at this URL of the recipe, or it wants another key.
        ServerFailed: the same where it was there before, and no other server works on.
    """
    deadline = asyncio.get_running_loop().time() + start_s
    failure = ServerFailed if again else UserError

    async def wait(ask: Callable[[], Awaitable[Any]], field: str, url: str) -> None:
        nonlocal deadline
        told = False
        while True:
            try:
                await ask()
                return
            except ServerError as error:
                if isinstance(error, ServerRefused) and error.denied:
                    raise failure(str(error)) from None
                late = asyncio.get_running_loop().time() - deadline
                if late >= 0 and again and others_work():
                    log.warning("%s: still away; the others work on without it", client.url)
                    deadline += late + start_s
                elif late >= 0:
                    raise failure(
                        f"generator.sglang.{field} = {url!r}: nothing answered for {start_s:.0f} s ({error}); write "
                        "the URL of one that runs, or a larger generator.sglang.start_s"
                    ) from None
                if not told:
                    log.warning("%s: waiting for it, up to %.0f s", error, start_s)
                told = True
                await asyncio.sleep(ASK_S)

    await wait(lambda: client.info(ANSWER_S), "attach", client.url)
    await wait(lambda: client.ask_admin(ANSWER_S), "attach", client.url)
    if place is not None:
        await wait(lambda: place.router.be_there(ANSWER_S), "router", place.router.url)
        await wait(place.look, "router", place.router.url)
