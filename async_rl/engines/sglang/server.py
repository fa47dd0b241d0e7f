"""A SGLang server as a child of this process: started, watched, ended. It never outlives the thread that started it.

A small program between us asks the kernel for that (PDEATHSIG survives exec); SGLang's own processes ask for the same
of theirs. Its output goes to a log file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from async_rl.engines.sglang.client import ServerError, ServerRefused, SGLangClient
from async_rl.errors import AsyncRLError

PROBE_S = 0.5
STOP_S = 5.0
LOG_LINES = 3
DIES_WITH_US = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


class ServerFailed(AsyncRLError):
    """The server did not start, or keeps dying; the message names its log."""


class ServerProcess:
    """One run of the server; start another one after it has exited."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """command: with `{port}` where the port goes."""
        self._command, self._environment, self._log = command, environment, log
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self) -> None:
        """The process exists when this returns; it is not up yet."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [part.replace("{port}", str(port)) for part in self._command]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                DIES_WITH_US,
                str(os.getpid()),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=dict(os.environ) | dict(self._environment),
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def wait_ready(self, client: SGLangClient, timeout_s: float) -> None:
        """A foreign server tells nobody when it is up: it is asked twice a second.

        Raises:
            ServerFailed: it exited, or does not answer within the deadline.
        """
        assert self._process is not None
        exited = asyncio.create_task(self._process.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while not exited.done():
                    try:
                        await client.info()
                        return
                    except ServerError as error:
                        if isinstance(error, ServerRefused) and error.denied:
                            raise ServerFailed(str(error)) from None
                        await asyncio.wait([exited], timeout=PROBE_S)
        except TimeoutError:
            raise ServerFailed(f"the SGLang server was not up after {timeout_s:.0f} s{self.see_log()}") from None
        finally:
            exited.cancel()
        raise ServerFailed(f"the SGLang server exited with {self._process.returncode}{self.see_log()}")

    async def wait_exit(self) -> str:
        """How it ended, in words, once it has."""
        assert self._process is not None
        code = await self._process.wait()
        self._kill()  # what is left of its group
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    async def stop(self) -> None:
        """Asked first, so that it ends its own processes and frees the devices; killed after STOP_S."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
        self._kill()
        await self._process.wait()

    def kill(self) -> None:
        """At once; `wait_exit` returns."""
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def see_log(self) -> str:
        """The last lines that say something, and where the others are."""
        try:
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        said = " | ".join(lines[-LOG_LINES:])
        return f": see {self._log}" + (f", which ends: {said}" if said else "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
