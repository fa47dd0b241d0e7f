"""Weights of equal number that are not ours: another run at the same server, and what foreign weights leave behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_cases import request

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang import worker
from async_rl.engines.sglang.client import SGLangClient
from async_rl.engines.sglang.push import WeightPush
from async_rl.engines.sglang.update import checksums
from async_rl.errors import UserError
from async_rl.wire.messages import WeightsId

from .conftest import Server
from .sglang_cases import make_engine, meddle, running, snapshot


def test_two_runs_at_one_server(
    server: Server, tmp_path: Path, models: dict[int, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Both hold weights 0.0, which differ. The one that came later is told so; the other loses no request and takes no
    token of other weights for its own."""
    theirs = Snapshot(WeightsId(0, 0), snapshot(models, 1).tensors)

    async def second(engine: Any) -> None:
        async with running(engine) as feed:
            await engine.load_weights(theirs)
            feed.submit(8)
            await engine.wait_stopped()

    async def main() -> None:
        first, later = (make_engine(tmp_path / name, attach=[server.url]) for name in ("first", "later"))
        async with running(first) as feed:
            await first.load_weights(snapshot(models, 0))
            feed.submit(48)
            await feed.grow()
            message = rf"generator.sglang.attach: another run .* into {server.url}, and was there first"
            with pytest.RaisesGroup(pytest.RaisesExc(UserError, match=message)):
                await second(later)
            feed.submit(8)
            await feed.finish()
            feed.check(models)

    asyncio.run(main())
    assert "another run of async_rl, which came later" in caplog.text


def test_nothing_of_a_cache_that_foreign_weights_wrote_is_used(
    server: Server,
    tmp_path: Path,
    models: dict[int, Any],
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under `keep` caches are not flushed, but told apart by the weights' name; here a prompt is prefilled under the
    name of ours with the weights of somebody else, before we notice."""
    monkeypatch.setattr(worker, "PROBE_S", 600.0)

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], in_flight="keep")
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            await asyncio.to_thread(server.run, meddle(model_directory))
            feed.requests[0] = request(0, tuple(range(1, 49)), 16)
            engine.submit([feed.requests[0]])
            await feed.finish()
            feed.check(models)

    asyncio.run(main())


@pytest.mark.parametrize("moment", ["between two buckets", "behind a load from disk"])
def test_somebody_loads_weights_in_the_middle_of_ours(
    server: Server,
    tmp_path: Path,
    models: dict[int, Any],
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """What is called ours is ours, bit for bit: all of it is loaded again."""
    send, disk, left = WeightPush.send, SGLangClient.load_from_disk, 2

    async def others() -> None:
        nonlocal left
        left -= 1
        if not left:
            await asyncio.to_thread(server.run, meddle(model_directory))

    async def send_and_meddle(push: Any, bucket: Any, **options: Any) -> None:
        await send(push, bucket, **options)
        await others()

    async def load_and_meddle(client: SGLangClient, directory: str, *arguments: Any, flush: bool) -> None:
        await disk(client, directory, *arguments, flush=flush)
        if directory != str(model_directory):
            await others()

    async def main() -> None:
        by = "group" if moment == "between two buckets" else "disk"
        engine = make_engine(tmp_path, attach=[server.url], bucket_bytes=9000, load_by=by)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            monkeypatch.setattr(WeightPush, "send", send_and_meddle)
            monkeypatch.setattr(SGLangClient, "load_from_disk", load_and_meddle)
            await engine.load_weights(snapshot(models, 1))
            if by == "disk":
                await engine.load_weights(snapshot(models, 2))
            version = 1 if by == "group" else 2
            assert left <= 0
            (found,) = await asyncio.to_thread(server.run, lambda client: client.checksums(30))
            assert found == checksums(snapshot(models, version).tensors)
            feed.submit(4)
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["reloads"] == (by == "group")

    asyncio.run(main())
