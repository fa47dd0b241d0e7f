"""A real SGLang server on the CPU, from an environment of its own (`make test-sglang`), for the session.

Its Python is ASYNC_RL_SGLANG_PYTHON, by default .venv-sglang. Models are made here: two layers, random weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from async_rl.engines.sglang.client import NO_KEYS, ServerError, SGLangClient
from async_rl.engines.sglang.keys import Keys
from async_rl.engines.sglang.server import free_port

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "engines"))

from engine_cases import configs, make_model  # noqa: E402

PYTHON = Path(os.environ.get("ASYNC_RL_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
CPU_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "tests" / "sglang" / "cpu_shim"),
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
CPU_ARGUMENTS = [
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--max-total-tokens", "16384", "--mem-fraction-static", "0.95"),  # of what others leave of the memory meanwhile
]
START_S = 240.0
VERSIONS = 3


@dataclass
class Server:
    """One server, ours to kill."""

    line: list[str]
    url: str
    log: Path
    keys: Keys = NO_KEYS
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            environment = os.environ | CPU_ENVIRONMENT
            self.process = subprocess.Popen(
                self.line, stdout=output, stderr=output, start_new_session=True, env=environment
            )

    def kill(self) -> None:
        """All of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_up(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.run(lambda client: client.info())
                return
            except ServerError as error:
                tail = self.log.read_text(errors="replace")[-2000:]
                assert self.process.poll() is None and time.monotonic() < deadline, f"{error}\n{tail}"
                time.sleep(0.5)

    def run(self, body: Any) -> Any:
        """`await body(client)` on a loop of its own."""

        async def main() -> Any:
            async with aiohttp.ClientSession() as session:
                return await body(SGLangClient(self.url, session, self.keys))

        return asyncio.run(main())


def command(model: Path, *more: str) -> list[str]:
    """How the tests start a server; `more` overrides."""
    return [
        *(str(PYTHON), "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"),
        *("--port", "{port}", "--device", "cpu", "--dtype", "float32", "--weight-version", "none", "--sleep-on-idle"),
        *("--skip-tokenizer-init", "--incremental-streaming-output", "--max-running-requests", "16"),
        *("--log-level-http", "warning", *CPU_ARGUMENTS, *more),
    ]


@pytest.fixture(scope="session", autouse=True)
def needs_sglang() -> None:
    if not PYTHON.exists():
        pytest.skip(f"there is no SGLang in {PYTHON}: make test-sglang installs it")


@pytest.fixture(scope="session")
def models() -> dict[int, Any]:
    """version -> a model; all of one architecture."""
    return {version: make_model(configs()["llama"], seed=version) for version in range(VERSIONS)}


@pytest.fixture(scope="session")
def model_directory(models: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What servers start with: weights that no engine calls its own."""
    directory = tmp_path_factory.mktemp("model")
    make_model(configs()["llama"], seed=99).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def start_server(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`start(*more)` starts a server, which ends with the session at the latest."""
    started: list[Server] = []

    def start(*more: str, keys: Keys = NO_KEYS) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        port = free_port()
        line = [part.replace("{port}", str(port)) for part in command(model_directory, *more)]
        one = Server(line, f"http://127.0.0.1:{port}", log, keys)
        started.append(one)
        one.wait_up()
        return one

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def server(start_server: Any) -> Server:
    return start_server()


@pytest.fixture(scope="session")
def another(start_server: Any) -> Server:
    """One to be killed and started again."""
    return start_server()
