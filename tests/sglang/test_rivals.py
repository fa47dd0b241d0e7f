"""Weights of equal number that are not ours: another run at the same server, and what foreign weights leave behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_cases import request

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang import worker
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
