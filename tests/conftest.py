"""Shared by all tests: asyncio without a plugin, in real or in virtual time."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from async_rl.simulate.virtual_loop import run_virtual

Main = Coroutine[Any, Any, Any]

# A suite that was started in the background of a script inherits an ignored SIGINT, and so would all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under ASYNC_RL_REQUIRE=all a test that would skip because a real part is missing fails."""
    report = yield
    if report.skipped and os.environ.get("ASYNC_RL_REQUIRE") == "all":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} would skip under ASYNC_RL_REQUIRE=all: {report.longrepr}"
    return report


@pytest.fixture
def virtual() -> Callable[[Main], Any]:
    """Run a coroutine in virtual time."""
    return run_virtual


@pytest.fixture
def real() -> Callable[[Main], Any]:
    """Run a coroutine on a real loop; a test that hangs fails after 30 s."""

    def run(main: Main) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(30):
                return await main

        return asyncio.run(bounded())

    return run
