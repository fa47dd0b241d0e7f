"""Somebody else meddles with a server, or kills it, while it works for us."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_rl.engines.sglang import worker
from async_rl.engines.sglang.contract import version_name
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.errors import UserError
from async_rl.wire.messages import WeightsId

from .conftest import CPU_ENVIRONMENT, START_S, Server, command
from .sglang_cases import make_engine, meddle, running, snapshot


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

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url])
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            await asyncio.to_thread(server.run, meddle(model_directory))
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


def test_one_of_two_servers_hangs(
    server: Server, another: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes no connection, and says nothing: what is with it is sampled again by the other one. Then it goes on."""
    monkeypatch.setattr(worker, "PROBE_ANSWER_S", 0.3)
    monkeypatch.setattr(worker, "PROBE_S", 0.1)

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url, another.url], slots=12)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            os.killpg(another.process.pid, signal.SIGSTOP)
            try:
                await feed.finish()
                assert engine.gauges()["servers_ready"] == 1
            finally:
                os.killpg(another.process.pid, signal.SIGCONT)
            await engine.load_weights(snapshot(models, 1))
            feed.submit(8)
            await feed.finish()
            feed.check(models)

    asyncio.run(main())


def test_a_server_that_hangs_does_not_hold_up_the_end(
    another: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not told that its weight group is over; the next one forms another."""
    monkeypatch.setattr(worker, "PROBE_S", 600.0)

    async def main(stops: bool) -> None:
        engine = make_engine(tmp_path, attach=[another.url])
        async with running(engine, 20) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(4)
            await feed.finish()
            if stops:
                os.killpg(another.process.pid, signal.SIGSTOP)

    try:
        asyncio.run(main(stops=True))
    finally:
        os.killpg(another.process.pid, signal.SIGCONT)
    asyncio.run(main(stops=False))


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
