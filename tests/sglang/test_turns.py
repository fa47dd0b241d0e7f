"""A server that runs already shares its device: what happens to it while it is off the device, and after."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from async_rl.engines.sglang import worker
from async_rl.engines.sglang.client import ServerGone, SGLangClient
from async_rl.engines.sglang.contract import ASLEEP

from .conftest import ROOT, Server
from .sglang_cases import make_engine, running, snapshot

sys.path.insert(0, str(ROOT / "tests" / "weights"))

from proxy import Proxy


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each time that a server takes its memory again. One that never gave it back dies of that."""
    real, calls = SGLangClient.take_memory, list[str]()

    async def take_memory(client: SGLangClient) -> None:
        calls.append(client.url)
        await real(client)

    monkeypatch.setattr(SGLangClient, "take_memory", take_memory)
    return calls


@pytest.fixture
def attaching(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an engine looks for a server that runs already."""
    real, began = worker.attach, threading.Event()

    async def attach(*server: Any, **how: Any) -> None:
        began.set()
        await real(*server, **how)

    monkeypatch.setattr(worker, "attach", attach)
    return began


def version_of(server: Server) -> str:
    return server.run(lambda client: client.weight_version())


@pytest.mark.timeout(200)
@pytest.mark.parametrize("noticed", [True, False])
def test_a_server_that_is_started_again_off_the_device(
    another: Server,
    tmp_path: Path,
    models: dict[int, Any],
    taken: list[str],
    noticed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gave no memory back, and whoever paused it is gone. noticed: the engine looks at it in between."""

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[another.url], off_device=True)
        async with running(engine, 180) as feed:
            await engine.load_weights(snapshot(models, 0))
            if noticed:
                feed.submit(8)
                await feed.grow()
            await engine.release()
            assert await asyncio.to_thread(version_of, another) == ASLEEP
            await asyncio.to_thread(another.kill)
            another.start()
            await asyncio.to_thread(another.wait_up)
            await engine.load_weights(snapshot(models, 1))
            feed.submit(8)
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == noticed

    if not noticed:
        monkeypatch.setattr(worker, "PROBE_S", 600.0)
    asyncio.run(main())
    assert len(taken) <= 2, "at its first turn; at its second if it was found in time to be sent off again"


@pytest.fixture
def network(server: Server) -> Iterator[Proxy]:
    """Between the engine and its server."""
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    proxy = Proxy((parts.hostname, parts.port))
    yield proxy
    proxy.close()


def test_a_server_that_was_cut_off_while_off_the_device(
    network: Proxy,
    tmp_path: Path,
    models: dict[int, Any],
    taken: list[str],
    attaching: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine gives it up, and finds it again as it left it: without memory."""
    monkeypatch.setattr(worker, "PROBE_S", 0.1)
    monkeypatch.setattr(worker, "PROBE_ANSWER_S", 0.5)

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[network.url])
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            await engine.release()
            attaching.clear()
            network.cut()
            await asyncio.to_thread(attaching.wait)
            network.heal()
            await engine.load_weights(snapshot(models, 1))
            await feed.finish()
            feed.check(models)

    asyncio.run(main())
    assert len(taken) == 1


def test_a_server_that_is_lost_again_while_it_is_asked_what_it_holds(
    server: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = SGLangClient.weight_version, 0

    async def weight_version(client: SGLangClient) -> str:
        nonlocal lost
        lost += 1
        if lost == 1:
            raise ServerGone("cut")
        return await real(client)

    async def main() -> None:
        monkeypatch.setattr(SGLangClient, "weight_version", weight_version)
        async with running(make_engine(tmp_path, attach=[server.url])) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(4)
            await feed.finish()
            feed.check(models)
            assert feed.engine.gauges()["restarts"] == 1

    asyncio.run(main())


def test_whoever_attaches_next_gives_it_its_memory(
    server: Server, tmp_path: Path, models: dict[int, Any], taken: list[str]
) -> None:
    """A generator ends while its server is off the device."""

    async def first() -> None:
        engine = make_engine(tmp_path, attach=[server.url])
        async with running(engine):
            await engine.load_weights(snapshot(models, 0))
            await engine.release()

    async def second() -> None:
        async with running(make_engine(tmp_path, attach=[server.url])) as feed:
            await feed.engine.load_weights(snapshot(models, 1))
            feed.submit(4)
            await feed.finish()
            feed.check(models)

    asyncio.run(first())
    assert version_of(server) == ASLEEP and not taken
    asyncio.run(second())
    assert len(taken) == 1
