"""Processes that grade, so that whatever hangs, dies or eats memory can be killed without a trace in this process.

    grade = await pool("math").grade(Compare("x+1", ["1+x"]), deadline_s=10)

A pool belongs to the event loop it was asked for on, and ends with it. Its processes start when they are first needed,
at most `rewards.workers`; who finds all of them busy waits, which is the back-pressure: an episode waits for its
reward, and a generator has so many episodes. A job's deadline counts from when a process has it. At the deadline the
process is killed, and another takes its place for the next job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import NoReturn, Protocol

from async_rl.config import Rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards.client import Client
from async_rl.rewards.jobs import (
    HEADER,
    Compare,
    FromChild,
    Kind,
    Ready,
    Refused,
    RunProgram,
    Setup,
    ToChild,
    Verdict,
    frame,
    from_child,
)
from async_rl.rewards.lifetime import until_the_loop_ends

START_S = 120.0
"""For a process to import what it needs: half a second, on a machine that has nothing else to do."""
LEAVE_S = 5.0
"""For an idle process to end by itself, before it is killed."""
JOBS = 2_000
"""A process that has done so many makes room for a new one: sympy remembers a lot."""

_settings = Rewards()
_pools: dict[tuple[asyncio.AbstractEventLoop, Kind], Graders] = {}


def configure(settings: Rewards) -> None:
    """For all pools that this process makes from now on."""
    global _settings
    _settings = settings


def settings() -> Rewards:
    return _settings


class Graders(Protocol):
    async def grade(self, job: Compare | RunProgram, *, deadline_s: float) -> Verdict:
        """
        Args:
            deadline_s: from when a process has the job.

        Raises:
            GradingFailed: no verdict; the process hung, died, or could not be set up.
            UserError: something is missing there, or the job makes no sense.
        """
        ...


def pool(kind: Kind) -> Graders:
    """Of the running loop."""
    key = asyncio.get_running_loop(), kind
    if key not in _pools:
        _pools[key] = RemotePool(kind, _settings) if _settings.service else Pool(kind, _settings)
    return _pools[key]


class RemotePool:
    """A reward service. Made by `pool`."""

    def __init__(self, kind: Kind, settings: Rewards) -> None:
        self._kind: Kind = kind
        self._client = Client(settings)
        self._keeper = until_the_loop_ends(self._close, f"{kind} service")

    async def grade(self, job: Compare | RunProgram, *, deadline_s: float) -> Verdict:
        answer = await self._client.grade(self._kind, job, deadline_s)
        if isinstance(answer, Verdict):
            return answer
        _refuse(answer)

    async def _close(self) -> None:
        _pools.pop((asyncio.get_running_loop(), self._kind), None)
        await self._client.close()


class Pool:
    """Processes on this machine. Made by `pool`."""

    def __init__(self, kind: Kind, settings: Rewards) -> None:
        self._kind: Kind = kind
        self._settings = settings
        self._room = asyncio.Semaphore(settings.workers)
        self._processes: set[_Process] = set()
        self._free: list[_Process] = []
        self._keeper = until_the_loop_ends(self._close, f"{kind} graders")

    async def grade(self, job: Compare | RunProgram, *, deadline_s: float) -> Verdict:
        async with self._room:
            process = self._free.pop() if self._free else await self._start()
            done = False
            try:
                async with asyncio.timeout(deadline_s):
                    answer = await process.ask(job)
                done = True
            except TimeoutError:
                raise GradingFailed(f"{self._kind}: no verdict after {deadline_s:g} s; the grader was killed") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise GradingFailed(f"{self._kind}: the grader {_fate(await process.end())}") from None
            finally:
                if done and process.jobs < JOBS:
                    self._free.append(process)
                else:
                    self._processes.discard(process)
                    await (process.leave() if done else process.end())
        if isinstance(answer, Verdict):
            return answer
        _refuse(answer)

    async def _start(self) -> _Process:
        process = await _Process.start()
        self._processes.add(process)
        ready = False
        try:
            async with asyncio.timeout(START_S):
                answer = await process.ask(Setup(self._kind, self._settings))
            ready = isinstance(answer, Ready)
        except TimeoutError:
            raise GradingFailed(f"{self._kind}: a grader was not ready after {START_S:.0f} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise GradingFailed(f"{self._kind}: a grader {_fate(await process.end())} while it started") from None
        finally:
            if not ready:
                self._processes.discard(process)
                await process.end()
        if not ready:
            _refuse(answer)
        return process

    async def _close(self) -> None:
        _pools.pop((asyncio.get_running_loop(), self._kind), None)
        free, busy = self._free, self._processes.difference(self._free)
        await asyncio.gather(*(process.leave() for process in free), *(process.end() for process in busy))


class _Process:
    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self.jobs = 0

    @classmethod
    async def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "async_rl.rewards.worker", str(os.getpid())),
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    async def ask(self, message: ToChild) -> FromChild:
        """Raises IncompleteReadError or ConnectionError: the process is gone."""
        self.jobs += 1
        self._writer.write(frame(message))
        await self._writer.drain()
        (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        return from_child.decode(await self._reader.readexactly(size))

    async def leave(self) -> None:
        """One that is idle tidies up."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._process.wait()
        await self.end()

    async def end(self) -> int:
        """SIGKILL. Its exit code; minus the signal that ended it, which may have come before."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        self._writer.close()
        return await self._process.wait()


def _fate(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed from outside (is memory short?)"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def _refuse(answer: FromChild) -> NoReturn:
    assert isinstance(answer, Refused)
    raise UserError(answer.reason) if answer.of_the_user else GradingFailed(answer.reason)
