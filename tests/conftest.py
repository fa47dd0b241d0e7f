"""Shared by all tests: asyncio without a plugin, in real or in virtual time; one torch thread; a world of one rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from async_rl.simulate.virtual_loop import run_virtual

if TYPE_CHECKING:
    from async_rl.learner.distributed import Ranks

Main = Coroutine[Any, Any, Any]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing here has imported torch yet; child processes inherit it

# Cores are shared: how long an example takes, or its making, says nothing of the code.
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")

# A suite that was started in the background of a script inherits an ignored SIGINT, and so would all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under ASYNC_RL_REQUIRE=all a test that would skip because a real part is missing fails. What a machine does not
    permit is no missing part, and ASYNC_RL_WITHOUT names those that could not be had."""
    report = yield
    without = [f"{name} is not installed" for name in os.environ.get("ASYNC_RL_WITHOUT", "").split()]
    if (
        report.skipped
        and not any(reason in str(report.longrepr) for reason in ["not permitted here", *without])
        and os.environ.get("ASYNC_RL_REQUIRE") == "all"
    ):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} would skip under ASYNC_RL_REQUIRE=all: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that would skip as a whole."""
    report = yield
    if report.skipped and os.environ.get("ASYNC_RL_REQUIRE") == "all":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} would skip under ASYNC_RL_REQUIRE=all: {report.longrepr}"
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


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A world of one, under torch.distributed like any other."""
    import torch

    from async_rl.learner.distributed import Ranks

    started = Ranks.start(torch.device("cpu"))
    yield started
    started.stop()
