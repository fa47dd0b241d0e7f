"""A real server, and a router in front of it, that ask for keys."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from async_rl.engines.sglang.keys import Keys
from async_rl.engines.sglang.server import free_port
from async_rl.errors import UserError

from .conftest import CPU_ENVIRONMENT, PYTHON, Server
from .sglang_cases import make_engine, running, snapshot


@pytest.fixture(scope="module")
def locked(start_server: Any) -> Server:
    return start_server("--api-key", "one", "--admin-api-key", "two", keys=Keys("one", "two"))


@pytest.mark.timeout(300)
def test_requests_and_weights_with_keys(locked: Server, models: dict[int, Any], tmp_path: Path) -> None:
    async def main(router: str) -> None:
        engine = make_engine(tmp_path, attach=[locked.url], router=router, keys=Keys("one", "two"))
        async with running(engine) as feed:
            feed.submit(8)
            await engine.load_weights(snapshot(models, 0))
            await feed.finish()
            feed.check(models)

    asyncio.run(main(""))
    port = free_port()
    line = [str(PYTHON), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--prometheus-port", str(free_port()), "--api-key", "one", "--worker-urls", locked.url]
    with (tmp_path / "router.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ | CPU_ENVIRONMENT)
    try:
        asyncio.run(main(f"http://127.0.0.1:{port}"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("keys", "field"), [(Keys(), "api_key_env"), (Keys("one", "one"), "admin_api_key_env")])
def test_a_key_that_is_missing_or_wrong_is_named(locked: Server, tmp_path: Path, keys: Keys, field: str) -> None:
    """At once: it will not become right by waiting."""

    async def main() -> None:
        async with running(make_engine(tmp_path, attach=[locked.url], keys=keys), 60) as feed:
            await feed.engine.wait_stopped()

    with pytest.RaisesGroup(pytest.RaisesExc(UserError, match=rf"{locked.url}.*401.*generator\.sglang\.{field}")):
        asyncio.run(main())
