"""The suite of every engine (tests/engines/test_conformance.py), on a real server: same requests, same assertions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from test_conformance import *  # noqa: F403 - the tests
from test_conformance import MAX_LENGTH, SLOTS, VOCABULARY, Driver, drive

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang.settings import InFlight
from async_rl.wire.messages import WeightsId

from .conftest import Server
from .sglang_cases import make_engine

MODES: list[InFlight] = ["recompute", "keep", "drain"]


@pytest.fixture(params=MODES)
def on_engine(
    request: pytest.FixtureRequest, server: Server, models: dict[int, Any], tmp_path: Path
) -> Callable[[Callable[[Driver], Awaitable[None]]], None]:
    def run(body: Callable[[Driver], Awaitable[None]]) -> None:
        def snapshot(version: int) -> Snapshot:
            return Snapshot(WeightsId(0, version), dict(models[version].named_parameters()))

        async def main() -> None:
            engine = make_engine(
                tmp_path,
                attach=[server.url],
                in_flight=request.param,
                slots=SLOTS,
                vocabulary=VOCABULARY,
                max_length=MAX_LENGTH,
            )
            async with asyncio.timeout(60):
                await drive(engine, snapshot, body, models)

        asyncio.run(main())

    return run
