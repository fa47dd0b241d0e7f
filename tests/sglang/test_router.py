"""Requests through a real sglang-router; everything else goes to each of the servers behind it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_cases import request

from async_rl import recipes
from async_rl.doctor.check import Check
from async_rl.doctor.servers import servers as examined
from async_rl.engines.sglang import worker
from async_rl.engines.sglang.router import Router
from async_rl.engines.sglang.server import free_port
from async_rl.engines.sglang.update import ServerWeights
from async_rl.errors import UserError

from .conftest import CPU_ENVIRONMENT, PYTHON, ROOT, START_S, Server
from .sglang_cases import drifting, make_engine, running, snapshot

ROUTER_S = 60.0


@contextmanager
def routing(servers: Sequence[Server], log: Path, *more: str) -> Iterator[str]:
    """The URL of a router in front of them."""
    port = free_port()
    line = [str(PYTHON), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--prometheus-port", str(free_port()), "--policy", "round_robin", *more]
    line += ["--worker-urls", *(one.url for one in servers)]
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=output, env=os.environ | CPU_ENVIRONMENT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + ROUTER_S
        while not answers(f"{url}/readiness"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def prefilled(server: Server) -> float:
    """Tokens since it was started."""
    return server.run(lambda client: client._get("v1/loads", 30))["loads"][0]["total_prefill_uncached_tokens"]


@pytest.fixture
def router(server: Server, another: Server, tmp_path: Path) -> Iterator[tuple[str, list[Server]]]:
    """Its URL, and the two servers behind it."""
    with routing([server, another], tmp_path / "router.log") as url:
        yield url, [server, another]


def test_a_router_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    """Before anything is asked of it: the server behind it is not to blame."""

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], router="http://127.0.0.1:9/", start_s=1.0)
        async with running(engine) as feed:
            await feed.engine.wait_stopped()

    says = r"generator.sglang.router = 'http://127.0.0.1:9': nothing answered for 1 s"
    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match=says)):
        asyncio.run(main())


@pytest.mark.timeout(400)
def test_two_servers_behind_a_router(router: tuple[str, list[Server]], tmp_path: Path) -> None:
    """Requests go to the router; pauses, weights and aborts to each server."""
    url, servers = router
    models = drifting(6)

    before = [prefilled(one) for one in servers]

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[one.url for one in servers], router=url, slots=12, stream_tokens=8)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            for version in range(1, 6):
                await feed.grow()
                await engine.load_weights(snapshot(models, version))
                feed.submit(4)
            engine.submit([request(1000, (1,), 200)])
            engine.cancel([1000])
            await feed.until(lambda: feed.ended(1000))
            assert feed.chunks.pop(1000)[-1].finish_reason == "aborted"
            await feed.finish()
            feed.check(models)

    asyncio.run(main())
    assert all(prefilled(one) > then for one, then in zip(servers, before, strict=True)), "both have worked"


@pytest.mark.timeout(200)
def test_one_of_two_behind_a_router_is_killed_and_comes_back(
    server: Server,
    another: Server,
    tmp_path: Path,
    models: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The other one works on, and gets new weights, although it stays away for longer than one may at the start; and so
    while it is back and lacks them. Then requests reach it again."""
    load, put_in = ServerWeights.load, Router.put_in
    lacking, gate, back = threading.Event(), threading.Event(), threading.Event()
    gate.set()

    async def load_late(weights: Any, *arguments: Any, **options: Any) -> Any:
        if weights._client.url == another.url and not gate.is_set():
            lacking.set()
            await asyncio.to_thread(gate.wait)
        return await load(weights, *arguments, **options)

    async def in_again(router: Router, url: str) -> None:
        await put_in(router, url)
        back.set()

    async def main(url: str) -> None:
        engine = make_engine(tmp_path, attach=[server.url, another.url], router=url, slots=12, start_s=5.0)
        async with running(engine, 190) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            gate.clear()
            await asyncio.to_thread(another.kill)
            await feed.finish()
            await engine.load_weights(snapshot(models, 1))
            assert engine.gauges()["servers_ready"] == 1
            another.start()
            assert await asyncio.to_thread(lacking.wait, START_S)
            feed.submit(24)
            await feed.finish()
            gate.set()
            assert await asyncio.to_thread(back.wait, 30)
            await engine.load_weights(snapshot(models, 2))
            feed.submit(8)
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 1 and engine.gauges()["servers_ready"] == 2

    monkeypatch.setattr(worker, "PROBE_S", 0.1)
    monkeypatch.setattr(ServerWeights, "load", load_late)
    monkeypatch.setattr(Router, "put_in", in_again)
    with routing([server, another], tmp_path / "router.log", "--disable-circuit-breaker") as url:
        asyncio.run(main(url))
    assert f"SGLang server {another.url} is gone" in caplog.text
    assert "still away; the others work on" in caplog.text
    assert "which are not ours" not in caplog.text
    assert prefilled(another) > 0, "it has worked since it was started again"


def test_the_doctor_sees_whether_servers_can_be_taken_out(router: tuple[str, list[Server]]) -> None:
    url, servers = router

    def of_the_router(*attach: str) -> Check:
        sets = [f"generator={{engine='sglang', sglang={{attach={list(attach)}, router='{url}'}}}}"]
        return examined(recipes.load(ROOT / "recipes" / "sort.toml", sets))[-1]

    assert of_the_router(servers[0].url, servers[1].url + "/").status == "ok"
    check = of_the_router(servers[0].url, servers[1].url.replace("127.0.0.1", "localhost"))
    named = ", ".join(sorted(one.url for one in servers))
    assert check.status == "warn" and f"it names its servers {named}" in check.detail


def test_one_of_two_behind_a_router_is_paused(
    router: tuple[str, list[Server]], tmp_path: Path, models: dict[int, Any]
) -> None:
    """The other one works on; only this one is resumed."""
    url, servers = router

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[one.url for one in servers], router=url, slots=12, stuck_s=1.0)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(12)
            await feed.grow()
            await asyncio.to_thread(servers[1].run, lambda client: client.pause("retract"))
            feed.submit(12)
            await feed.finish()
            assert [one.foreign_pauses for one in engine._workers] == [0, 1]
            feed.check(models)

    asyncio.run(main())


@pytest.mark.timeout(200)
def test_a_router_that_does_not_see_yet_that_its_server_is_back(
    another: Server, tmp_path: Path, models: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It turns everything away, for longer than pieces may be lost; nothing counts as lost."""
    slowly = [
        "--health-check-interval-secs",
        "2",
        "--health-failure-threshold",
        "1",
        "--health-success-threshold",
        "15",
    ]

    async def main(url: str) -> None:
        engine = make_engine(tmp_path, attach=[another.url], router=url, start_s=START_S)
        async with running(engine, 190) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            await asyncio.to_thread(another.kill)
            another.start()
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 1

    with routing([another], tmp_path / "router.log", *slowly) as url:
        asyncio.run(main(url))
    assert "pieces wait" in caplog.text
