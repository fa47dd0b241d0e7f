"""One service as a child process of this one: how it is started, what it tells, how it is ended.

launch.child is the child's end of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from async_rl.launch.child import PIPE_VARIABLE

from async_rl.telemetry.run_directory import RunDirectory

MALLOC = {
    "mmap_threshold": 32 << 20,
    "trim_threshold": 512 << 20,
    "top_pad": 64 << 20,
    "arena_max": 1,
    "hugetlb": 1,
}
"""glibc.malloc tunables of the services. By default every large tensor is mapped, zeroed page by page and unmapped
again: a quarter of the time of a training step of SmolLM2 (2.9 million page faults in four steps; so, 60 thousand). A
higher mmap_threshold is no faster, and the heap grows by fragmentation."""


class Order(msgspec.Struct, frozen=True):
    """One service to start."""

    role: str
    name: str
    """`generator-0`; stable across restarts."""
    connect: str
    """Address of the stream it joins; the controller has none."""
    environment: dict[str, str]
    """What it has beyond the environment of whoever starts it."""


class Process:
    """A service of this machine."""

    def __init__(self, process: asyncio.subprocess.Process, pipe: socket.socket) -> None:
        self._process, self._pipe = process, pipe

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """(kind, data) of what it tells, until it is gone. To be read once."""
        reader, writer = await asyncio.open_connection(sock=self._pipe, limit=1 << 24)
        try:
            while line := await reader.readline():
                event = json.loads(line)
                yield event["kind"], event["data"]
        except ConnectionResetError:
            pass  # killed with unread bytes in the pipe: the exit status says the rest
        finally:
            writer.close()

    async def wait(self) -> int:
        """Its exit code; -N: signal N ended it."""
        return await self._process.wait()

    def stop(self, within_s: float) -> None:
        """Ask for an orderly end within so long."""
        self._pipe.send(f"stop {within_s:g}\n".encode())

    def kill(self) -> None:
        """SIGKILL, past Popen, whose kill polls first and takes the exit status from the loop's child watcher."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)


class Here:
    """This machine. `environment`: what all its services have beyond ours, unless ours has it already."""

    def __init__(self, directory: RunDirectory, environment: Mapping[str, str] | None = None) -> None:
        self._directory, self._more = directory, dict(environment or {})

    async def start(self, order: Order) -> Process:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "async_rl.cli", "serve", order.role, "--config", str(self._directory.config)]
        command += ["--run-dir", str(self._directory.path), "--name", order.name]
        command += ["--connect", order.connect] if order.connect else []
        with log_of(self._directory, order.name).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we end the others in order
                env=self._environment(order, theirs.fileno()),
            )
        theirs.close()
        return Process(process, ours)

    async def present(self, *, needed: bool) -> None:
        """We are."""

    def _environment(self, order: Order, descriptor: int) -> Mapping[str, str]:
        defaults = {
            "OMP_NUM_THREADS": "1",  # more threads beside a busy process run slower than one
            "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{key}={value}" for key, value in MALLOC.items()),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        return defaults | self._more | dict(os.environ) | order.environment | {PIPE_VARIABLE: str(descriptor)}


def log_of(directory: RunDirectory, name: str) -> Path:
    """Where a service's output goes."""
    return directory.logs / f"{name}.log"
