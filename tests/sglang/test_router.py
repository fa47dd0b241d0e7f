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

from async_rl.engines.sglang import worker
from async_rl.engines.sglang.client import Load, SGLangClient
from async_rl.engines.sglang.server import free_port
from async_rl.engines.sglang.update import ServerWeights
from async_rl.errors import UserError

from .conftest import CPU_ENVIRONMENT, PYTHON, START_S, Server
from .sglang_cases import drifting, make_engine, running, snapshot

ROUTER_S = 60.0
LOOKS = 20


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

    def prefilled() -> list[float]:
        loads = [one.run(lambda client: client._get("v1/loads", 30)) for one in servers]
        return [load["loads"][0]["total_prefill_uncached_tokens"] for load in loads]

    before = prefilled()

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
    assert all(now > then for now, then in zip(prefilled(), before, strict=True)), "both have worked"


@pytest.mark.timeout(200)
def test_one_of_two_behind_a_router_is_killed_and_comes_back(
    server: Server,
    another: Server,
    tmp_path: Path,
    models: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It answers, and lacks our weights until the engine has looked at the other one LOOKS times. The router knows no
    difference: so everything waits, and nothing is sampled with the weights that it starts with."""
    load, look, came, gate, looks = ServerWeights.load, SGLangClient.load, threading.Event(), threading.Event(), 0
    gate.set()

    async def load_late(weights: Any, *arguments: Any, **options: Any) -> Any:
        if weights._client.url == another.url:
            await asyncio.to_thread(gate.wait)
        return await load(weights, *arguments, **options)

    async def count(client: SGLangClient, timeout_s: float = 30.0) -> Load:
        nonlocal looks
        looks += came.is_set() and client.url == server.url
        if looks == LOOKS:
            gate.set()
        return await look(client, timeout_s)

    async def main(url: str) -> None:
        attach = [server.url, another.url]
        engine = make_engine(tmp_path, attach=attach, router=url, slots=12, start_s=START_S)
        async with running(engine, 190) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            gate.clear()
            await asyncio.to_thread(another.kill)
            another.start()
            await asyncio.to_thread(another.wait_up)
            feed.submit(24)
            came.set()
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 1

    monkeypatch.setattr(worker, "PROBE_S", 0.1)
    monkeypatch.setattr(ServerWeights, "load", load_late)
    monkeypatch.setattr(SGLangClient, "load", count)
    with routing([server, another], tmp_path / "router.log", "--disable-circuit-breaker") as url:
        asyncio.run(main(url))
    assert f"SGLang server {another.url} is gone" in caplog.text
    assert "which are not ours" not in caplog.text


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
