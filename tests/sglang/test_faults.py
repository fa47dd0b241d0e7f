"""Somebody else meddles with a server, or kills it, while it works for us."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_cases import request

from async_rl.engines.sglang.contract import version_name
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.server import free_port
from async_rl.errors import UserError
from async_rl.wire.messages import WeightsId

from .conftest import CPU_ENVIRONMENT, PYTHON, START_S, Server, command
from .sglang_cases import drifting, make_engine, running, snapshot

ROUTER_S = 60.0


def test_a_server_that_somebody_else_paused_is_resumed(
    server: Server, tmp_path: Path, models: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], stuck_s=1.0)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(12)
            await feed.grow()
            await asyncio.to_thread(server.run, lambda client: client.pause("in_place"))
            await feed.finish()
            assert engine.gauges()["foreign_pauses"] == 1
            feed.check(models)

    asyncio.run(main())
    assert "resumed, as if somebody had paused it" in caplog.text


def test_weights_that_somebody_else_loaded_are_replaced(
    server: Server, tmp_path: Path, models: dict[int, Any], model_directory: Path
) -> None:
    """What was sampled by them is thrown away and sampled again."""

    async def meddle(client: Any) -> None:
        await client.pause("retract")
        await client.load_from_disk(str(model_directory), "somebody-else", 60, flush=True)
        await client.resume()

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url])
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            await asyncio.to_thread(server.run, meddle)
            await feed.finish()
            feed.check(models)
            found = await asyncio.to_thread(server.run, lambda client: client.weight_version())
            assert found == version_name(engine._owner, WeightsId(0, 0))

    asyncio.run(main())


def test_requests_that_somebody_else_aborted_go_on(server: Server, tmp_path: Path, models: dict[int, Any]) -> None:
    async def main() -> None:
        async with running(make_engine(tmp_path, attach=[server.url])) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(12)
            for _ in range(3):
                await feed.grow()
                await asyncio.to_thread(server.run, lambda client: client.abort(""))  # every id begins with nothing
            await feed.finish()
            feed.check(models)

    asyncio.run(main())


def ours(engine: SGLangEngine) -> psutil.Process:
    """The server that this engine started."""
    process = engine._workers[0]._process
    assert process is not None
    return psutil.Process(process.pid)


@pytest.mark.timeout(400)
def test_a_server_killed_under_load_is_started_again(
    tmp_path: Path, models: dict[int, Any], model_directory: Path
) -> None:
    """Its scheduler dies first, then the whole of it; what was in flight is sampled again from the last segment."""

    async def main() -> None:
        engine = make_engine(
            tmp_path, command=command(model_directory), environment=CPU_ENVIRONMENT, start_s=START_S, slots=12
        )
        async with running(engine, 390) as feed:
            feed.submit(8)
            await engine.load_weights(snapshot(models, 0))
            await feed.grow(8)
            scheduler = next(c for c in ours(engine).children(recursive=True) if "scheduler" in " ".join(c.cmdline()))
            scheduler.kill()
            feed.submit(8)
            await engine.load_weights(snapshot(models, 1))
            await feed.grow(8)
            ours(engine).kill()
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 2
            left = ours(engine)
        assert not left.is_running(), "the server ends with its engine"

    asyncio.run(main())


def test_a_server_that_cannot_start_is_named(tmp_path: Path) -> None:
    async def main(**settings: Any) -> None:
        async with running(make_engine(tmp_path, **settings)) as feed:
            await feed.engine.wait_stopped()

    nowhere = command(tmp_path / "nowhere")
    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match=r"generator.sglang: .* exited with .*see .*log")):
        asyncio.run(main(command=nowhere, environment=CPU_ENVIRONMENT, start_s=START_S))
    with pytest.RaisesGroup(
        pytest.RaisesExc(UserError, match=r"attach = 'http://127.0.0.1:9': nothing answered for 1 s")
    ):
        asyncio.run(main(attach=["http://127.0.0.1:9"], start_s=1.0))


def test_a_router_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    """Before anything is asked of it: the server behind it is not to blame."""

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], router="http://127.0.0.1:9/", start_s=1.0)
        async with running(engine) as feed:
            await feed.engine.wait_stopped()

    says = r"generator.sglang.router = 'http://127.0.0.1:9': nothing answered for 1 s"
    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match=says)):
        asyncio.run(main())


@pytest.fixture
def router(server: Server, another: Server, tmp_path: Path) -> Iterator[tuple[str, list[Server]]]:
    """Its URL, and the two servers behind it."""
    servers, port = [server, another], free_port()
    line = [str(PYTHON), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--prometheus-port", str(free_port()), "--policy", "round_robin"]
    line += ["--worker-urls", *(one.url for one in servers)]
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | CPU_ENVIRONMENT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + ROUTER_S
    while not answers(f"{url}/readiness"):
        said = (tmp_path / "router.log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.2)
    yield url, servers
    process.kill()
    process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


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
    router: tuple[str, list[Server]], tmp_path: Path, models: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Everything waits until it has our weights: nothing is sampled with those that it starts with."""
    url, servers = router

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[one.url for one in servers], router=url, slots=12, start_s=START_S)
        async with running(engine, 190) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            await asyncio.to_thread(servers[1].kill)
            servers[1].start()
            await asyncio.to_thread(servers[1].wait_up)
            feed.submit(24)
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 1

    asyncio.run(main())
    assert f"SGLang server {servers[1].url} is gone" in caplog.text
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
