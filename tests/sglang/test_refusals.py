"""The server says no, or the pause is over before anything was loaded: the old weights stay live, and nobody ends."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from async_rl.engines.sglang.client import SGLangClient
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.lease import PauseLease
from async_rl.engines.sglang.update import ServerBroken
from async_rl.weights.errors import WeightsError

from .conftest import Server
from .sglang_cases import Feed, make_engine, meddle, running, snapshot


async def old_weights_stay(engine: SGLangEngine, feed: Feed, models: dict[int, Any], message: str) -> None:
    """These of version 0 are live; those of version 1 are refused, and those of version 2 are not."""
    feed.submit(8)
    await feed.grow()
    with pytest.raises(WeightsError, match=message):
        await engine.load_weights(snapshot(models, 1))
    assert engine.weights == snapshot(models, 0).weights
    feed.submit(8)
    await feed.finish()
    assert {span.version for chunks in feed.chunks.values() for chunk in chunks for span in chunk.spans} == {0}


async def new_weights_come(engine: SGLangEngine, feed: Feed, models: dict[int, Any]) -> None:
    await engine.load_weights(snapshot(models, 2))
    feed.submit(4)
    await feed.finish()
    feed.check(models)


def test_a_weight_group_that_is_refused(
    server: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SGLangClient.init_group

    async def of_no_kind(
        client: Any, host: str, port: int, size: int, name: str, backend: str, timeout_s: float
    ) -> None:
        await real(client, host, port, size, name, "no-such-backend", timeout_s)

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], timeout_s=5.0)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            push = engine._workers[0]._weights._push
            assert push is not None
            push.drop()
            monkeypatch.setattr(SGLangClient, "init_group", of_no_kind)
            await old_weights_stay(engine, feed, models, r"init_weights_update_group: 400 .*no-such-backend")
            monkeypatch.setattr(SGLangClient, "init_group", real)
            await new_weights_come(engine, feed, models)

    asyncio.run(main())


def test_a_pause_that_ends_before_the_first_bucket(
    server: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buckets would reach a server at work."""
    begin, expire = SGLangClient.begin_update, PauseLease._expire

    async def main() -> None:
        expired = asyncio.Event()

        async def expires(lease: Any) -> None:
            await expire(lease)
            expired.set()

        async def begins_late(client: Any) -> None:
            await expired.wait()
            await begin(client)

        engine = make_engine(tmp_path, attach=[server.url], pause_s=0.5)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            with monkeypatch.context() as patched:
                patched.setattr(PauseLease, "_expire", expires)
                patched.setattr(SGLangClient, "begin_update", begins_late)
                await old_weights_stay(engine, feed, models, r"resumed after 0.5 s of pause .*pause_s")
            await new_weights_come(engine, feed, models)

    asyncio.run(main())


def test_a_server_that_refuses_the_weights_it_lacks_is_asked_again(
    server: Server,
    tmp_path: Path,
    models: dict[int, Any],
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Somebody else loads weights; ours are refused so often that it counts as lost once, and are taken then."""
    begin, left = SGLangClient.begin_update, 4

    async def of_no_kind(client: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            await begin(client)
        else:
            await client._post("begin_weight_update", {"selector": "no-such-selector"})

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url])
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.grow()
            monkeypatch.setattr(SGLangClient, "begin_update", of_no_kind)
            await asyncio.to_thread(server.run, meddle(model_directory))
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["restarts"] == 1

    asyncio.run(main())
    assert left < 0 and "does not get the weights it lacks" in caplog.text


def test_a_server_that_read_other_weights_than_it_was_told_to(
    server: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where checksums cannot be compared its version is: it stays paused, and the generator says so."""
    disk, info = SGLangClient.load_from_disk, SGLangClient.info

    async def as_another(client: Any, directory: str, version: str, timeout_s: float, *, flush: bool) -> None:
        await disk(client, directory, "another", timeout_s, flush=flush)

    async def on_a_gpu(client: Any, timeout_s: float = 30.0) -> Any:
        return dataclasses.replace(await info(client, timeout_s), device="cuda")

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], load_by="disk")
        async with running(engine):
            await engine.load_weights(snapshot(models, 0))
            monkeypatch.setattr(SGLangClient, "info", on_a_gpu)
            monkeypatch.setattr(SGLangClient, "load_from_disk", as_another)
            with pytest.raises(RuntimeError, match="the engine stopped before the weights were live"):
                await engine.load_weights(snapshot(models, 1))

    message = r"holds weights another, not async_rl-\w+\.0\.1; the weights of .* are half loaded, so it stays paused"
    with pytest.RaisesGroup(pytest.RaisesExc(ServerBroken, match=message)):
        asyncio.run(main())
    monkeypatch.undo()
    assert not server.run(lambda client: client.takes_requests())
    server.run(lambda client: client.resume())
