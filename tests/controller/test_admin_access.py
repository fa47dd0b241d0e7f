"""The admin endpoint over a real socket: names, origins and tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from schedules import recipe

from async_rl.controller import admin
from async_rl.controller.admin_access import Access
from async_rl.controller.controller import Controller
from async_rl.errors import UserError
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer

Run = Callable[[Any], Any]
TOKEN = "t0ken-of-the-run-and-of-nobody-else"
FILE = Path("run/secrets/token")


class Endpoint:
    """A controller's, and who calls it with nothing but what he is told to send."""

    def __init__(self, controller: Controller, url: str, session: aiohttp.ClientSession) -> None:
        self.controller, self.url, self._session = controller, url, session
        self.address = url.removeprefix("http://")

    async def get(self, **headers: str) -> tuple[int, dict[str, Any]]:
        return await self._call("GET", "/status", headers)

    async def pause(self, **headers: str) -> tuple[int, dict[str, Any]]:
        return await self._call("POST", "/pause", headers)

    async def _call(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        async with self._session.request(method, self.url + path, headers=headers) as answer:
            if answer.status == 401:
                schemes = [one.split()[0] for one in answer.headers.getall("WWW-Authenticate")]
                assert schemes == ["Bearer", "Basic"], "a header each, or Chromium does not ask for a password"
            return answer.status, json.loads(await answer.text())


@asynccontextmanager
async def endpoint(access: Access, host: str = "127.0.0.1") -> AsyncIterator[Endpoint]:
    controller = Controller(
        recipe(),
        ledger=await Ledger.open(MemoryStore()),
        tasks=NumberedTasks(),
        rollouts=MemoryServer(rollout_stream()),
        training=MemoryServer(training_stream()),
        journal=MemoryJournal(),
    )
    runner, url = await admin.start(controller, host, 0, access)
    try:
        async with aiohttp.ClientSession() as session:
            yield Endpoint(controller, url, session)
    finally:
        await runner.cleanup()


def test_only_with_the_token(real: Run) -> None:
    async def main() -> None:
        async with endpoint(Access("127.0.0.1", TOKEN, FILE)) as run:
            wrong = [
                {},
                {"Authorization": "Bearer"},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": f"Bearer {TOKEN[:-1]}"},
                {"Authorization": TOKEN},
                {"Authorization": f"Digest {TOKEN}"},
                {"Authorization": "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode()},
                {"Authorization": "Basic no base64!"},
            ]
            for headers in wrong:
                for call in (run.get, run.pause):
                    status, body = await call(**headers)
                    assert status == 401 and list(body) == ["error"], headers
                    assert str(FILE) in body["error"] and TOKEN not in body["error"]
            assert not run.controller.paused
            basic = "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()
            for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic):
                assert (await run.get(Authorization=right))[0] == 200
            assert await run.pause(Authorization=f"Bearer {TOKEN}") == (200, {"paused": True})
            assert run.controller.paused

    real(main())


def test_no_page_of_another_site_steers_a_run(real: Run) -> None:
    """On loopback, where no token is asked for: a browser sends Origin with every POST that comes from a page, and as
    Host the name that the page was loaded from."""

    async def main() -> None:
        async with endpoint(Access("127.0.0.1")) as run:
            port = run.address.rpartition(":")[2]
            for origin in (
                "http://evil.example",
                "null",
                "",
                f"http://{run.address}.evil.example",
                "http://127.0.0.1:1",
            ):
                status, body = await run.pause(Origin=origin)
                assert status == 403 and body["error"].startswith(f"Origin: {origin}: a page of another site"), origin
            for host in (
                "evil.example",
                f"evil.example:{port}",
                "127.0.0.1.evil.example",
                "localhost.evil",
                "",
                "[::1",
                "@",
            ):
                for call in (run.get, run.pause):
                    status, body = await call(Host=host)
                    assert status == 403 and body["error"].startswith(f"Host: {host}: this is no name of this"), host
            assert not run.controller.paused
            for host in (run.address, f"localhost:{port}", "LOCALHOST", "[::1]:80", "10.0.0.1:9999"):
                assert (await run.get(Host=host))[0] == 200, host
                assert (await run.pause(Host=host, Origin=f"http://{host}"))[0] == 200, host
            assert (await run.pause(Host="localhost:1", Origin="http://localhost:2"))[0] == 403

    real(main())


def test_the_name_in_the_recipe_is_one_of_ours(real: Run) -> None:
    async def main() -> None:
        async with endpoint(Access("Node7.cluster")) as run:
            assert (await run.get(Host="node7.cluster:80"))[0] == 200
            assert (await run.get(Host="node7.cluster.evil:80"))[0] == 403

    real(main())


def test_over_ipv6(real: Run) -> None:
    async def main() -> None:
        try:
            async with endpoint(Access("::1", TOKEN, FILE), "::1") as run:
                assert run.url.startswith("http://[::1]:")
                assert (await run.get())[0] == 401
                assert (await run.get(Authorization=f"Bearer {TOKEN}"))[0] == 200
        except UserError as error:
            pytest.skip(f"not permitted here: IPv6 ({error})")

    real(main())
