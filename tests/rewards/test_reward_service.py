"""A reward service and those who ask it, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from async_rl import config, rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards import client, service
from async_rl.rewards.jobs import Asked, Compare, Kind, RunProgram, Verdict, from_child

Real = Callable[[Coroutine[Any, Any, Any]], Any]


@asynccontextmanager
async def serving(
    grade: dict[Kind, service.Grade],
    monkeypatch: pytest.MonkeyPatch,
    missing: dict[Kind, str] | None = None,
    **settings: Any,
) -> AsyncIterator[service.Service]:
    """The recipe of this process names the service."""
    served = service.Service(config.Rewards(**settings), grade, missing or {})
    await served.start()
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(service=served.url, **settings))
    try:
        yield served
    finally:
        await served.close()


async def always(job: Compare | RunProgram, deadline_s: float) -> Verdict:
    return Verdict(1.0, f"{type(job).__name__} within {deadline_s:g} s", passed=1)


def test_the_environment_does_not_notice(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving({"math": always, "code": always}, monkeypatch):
            found = await rewards.math("$x$", "y")
            assert (float(found), found.reason) == (1.0, "Compare within 10 s")
            found = await rewards.code("```\n1\n```", [("", "")], time_limit_s=1)
            assert (float(found), found.reason) == (1.0, "RunProgram within 124 s")
            await asyncio.to_thread(rewards.require_code)
            await asyncio.to_thread(rewards.require_math)

    real(main())


def test_what_fails_there_fails_here(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hung(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        raise GradingFailed("the grader was killed")

    async def main() -> None:
        async with serving({"math": hung}, monkeypatch, {"code": "bubblewrap is not installed"}):
            with pytest.raises(GradingFailed, match="the grader was killed"):
                await rewards.math("$x$", "y")
            assert (await rewards.math("$x$", "y", on_failure="wrong")).reason == "failed"
            with pytest.raises(UserError, match="cannot grade this: bubblewrap is not installed"):
                await rewards.code("```\n1\n```", [("", "")])
            with pytest.raises(UserError, match=r"rewards.service = '.*': bubblewrap is not installed; start"):
                await asyncio.to_thread(rewards.require_code)

    real(main())


def test_a_service_that_is_at_work_says_so(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero bytes until the verdict."""
    monkeypatch.setattr(service, "BEAT_S", 0.001)
    released = asyncio.Event()

    async def slow(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        await released.wait()
        return Verdict(1.0, "symbolic", passed=1)

    async def main() -> None:
        async with serving({"math": slow}, monkeypatch) as served, aiohttp.ClientSession() as session:
            body = msgspec.msgpack.encode(Asked(Compare("x", ["y"]), 10))
            async with session.post(f"{served.url}/grade/math", data=body) as answer:
                assert await answer.content.readexactly(3) == b"\0\0\0"
                released.set()
                rest = (await answer.read()).lstrip(b"\0")
            assert from_child.decode(rest) == Verdict(1.0, "symbolic", passed=1)
            async with session.post(f"{served.url}/grade/math", data=b"nonsense") as answer:
                assert answer.status == 400 and "this is no job" in await answer.text()

    real(main())


def test_a_service_that_is_silent_is_given_up_on(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENT_S", 0.05)
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.0)
    asked = 0

    async def endless(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        nonlocal asked
        asked += 1
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def main() -> None:
        async with serving({"math": endless}, monkeypatch):
            with pytest.raises(GradingFailed, match=r"the reward service http://127.* gave no verdict for 0 s: "):
                await rewards.math("$x$", "y")
        assert asked > 0

    real(main())


def test_a_full_service_is_asked_again(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_WAITING", 1)
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.001)
    released = asyncio.Event()

    async def slow(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        await released.wait()
        return Verdict(1.0, "symbolic", passed=1)

    async def main() -> None:
        async with serving({"math": slow}, monkeypatch) as served:
            graded = asyncio.gather(*(rewards.math("$x$", "y") for _ in range(3)))
            async with aiohttp.ClientSession() as session:
                while True:
                    async with session.get(f"{served.url}/status") as answer:
                        if (await answer.json())["waiting"]:
                            break
                    await asyncio.sleep(0)
            released.set()
            assert await graded == [1.0] * 3

    real(main())


def test_a_job_whose_asker_is_gone_is_dropped(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, dropped = asyncio.Event(), asyncio.Event()

    async def endless(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            dropped.set()
        raise AssertionError

    async def main() -> None:
        async with serving({"math": endless}, monkeypatch):
            grading = asyncio.create_task(rewards.math("$x$", "y"))
            await begun.wait()
            grading.cancel()
            await dropped.wait()

    real(main())


def test_tokens(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"rewards.host = '0.0.0.0': whoever reaches it could run programs there"):
        real(service.Service(config.Rewards(host="0.0.0.0"), {}, {}).start())
    with pytest.raises(
        UserError, match=r"rewards.service_token_env = 'NO_SUCH': there is no such environment variable"
    ):
        service.Service(config.Rewards(service_token_env="NO_SUCH"), {}, {})
    monkeypatch.setenv("REWARD_TOKEN", "secret-8731")

    async def main() -> None:
        async with serving({"math": always}, monkeypatch, service_token_env="REWARD_TOKEN") as served:
            assert await rewards.math("$x$", "y") == 1.0
            async with aiohttp.ClientSession() as session:
                for path in ("status", "grade/math"):
                    async with session.post(f"{served.url}/{path}", headers={"Authorization": "Bearer x"}) as answer:
                        assert answer.status == 401
            monkeypatch.setenv("REWARD_TOKEN", "another")
            with pytest.raises(UserError, match="it answers 401, another token is wanted"):
                await asyncio.to_thread(rewards.require_math)

    real(main())


def test_nobody_there(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(service="http://127.0.0.1:9"))
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=r"rewards.service = 'http://127.0.0.1:9': no reward service answers there"):
        rewards.require_code()
    with pytest.raises(GradingFailed, match="gave no verdict for 0 s"):
        real(rewards.math("$x$", "y"))


def test_the_service_as_a_process(real: Real, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`async-rl serve reward`, real graders, and its end."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'steps = 1\nmodel.tiny = {characters = "0"}\n[environment]\nname = "sorting"\n[rewards]\nunsafe_code = true\n'
    )
    command = [sys.executable, "-m", "async_rl.cli", "serve", "reward", "--config", recipe, "--run-dir", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())["data"]
        assert "code" not in ready["missing"]
        monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(service=ready["url"]))
        assert real(rewards.code("```\nprint(int(input()) + 1)\n```", [("1", "2")])) == 1.0
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
