"""The suite of every engine (tests/engines/test_conformance.py), on a real server: same requests, same assertions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from test_conformance import *  # noqa: F403 - the tests
from test_conformance import MAX_LENGTH, SLOTS, VOCABULARY, Driver, drive
from test_conformance import test_a_swap_says_how_far_every_request_was as swap_says_how_far

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang.settings import InFlight
from async_rl.wire.messages import WeightsId

from .conftest import Server
from .sglang_cases import make_engine

MODES: list[tuple[InFlight, int]] = [("recompute", 1), ("keep", 1), ("drain", 1), ("recompute", 1000)]
"""And every so many tokens of a piece the server tells of it: at last, when it has ended."""


def name(mode: tuple[InFlight, int]) -> str:
    return f"{mode[0]}-{mode[1]}"


@pytest.fixture(params=MODES, ids=name)
def on_engine(
    request: pytest.FixtureRequest, server: Server, models: dict[int, Any], tmp_path: Path
) -> Callable[[Callable[[Driver], Awaitable[None]]], None]:
    def run(body: Callable[[Driver], Awaitable[None]]) -> None:
        def snapshot(version: int) -> Snapshot:
            return Snapshot(WeightsId(0, version), dict(models[version].named_parameters()))

        async def main() -> None:
            in_flight, stream_tokens = request.param
            engine = make_engine(
                tmp_path,
                attach=[server.url],
                in_flight=in_flight,
                stream_tokens=stream_tokens,
                slots=SLOTS,
                vocabulary=VOCABULARY,
                max_length=MAX_LENGTH,
            )
            async with asyncio.timeout(60):
                await drive(engine, snapshot, body, models)

        asyncio.run(main())

    return run


@pytest.mark.parametrize("on_engine", MODES[:-1], ids=name, indirect=True)
def test_a_swap_says_how_far_every_request_was(on_engine: Any) -> None:
    """To the token, where the server tells of each."""
    swap_says_how_far(on_engine)
