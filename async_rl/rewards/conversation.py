"""A process we speak with over its standard input and output, and may end at any time with all it has started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from async_rl.rewards.inside.channel import HEADER, pack

END_S = 10.0
"""From SIGKILL until nothing of it is left."""
MAX_ANSWER = 16 << 20
SAID = 500
"""Characters of standard error that are kept."""


class SetupFailed(Exception):
    """The sandbox did not come up, or did not end: nobody's but the machine's doing."""


class Ended(Exception):
    """The process is gone ("ended"), or did not answer in time ("time")."""


class Conversation:
    """Made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], gone: int, folder: str) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process, self._gone, self._folder = process, gone, folder
        self._pipes = (process.stdin, process.stdout, process.stderr)
        self._in, self._out, self._err = (pipe.fileno() for pipe in self._pipes)
        for descriptor in (self._in, self._out, self._err):
            os.set_blocking(descriptor, False)
        self._read = bytearray()

    @classmethod
    def start(
        cls,
        command: Callable[[Sequence[int]], list[str]],
        *,
        environment: Mapping[str, str],
        files: Sequence[bytes] = (),
        join: Callable[[], None] | None = None,
        uid: int | None = None,
    ) -> Conversation:
        """
        Args:
            command: gets the descriptors that the process inherits: one to hold as long as anything of it lives, and
                one for each of `files`.
            join: called in the child before all else; a control group's.
            uid: whose the process is, from then on.

        Raises:
            SetupFailed: it could not be started.
        """
        gone, held = os.pipe()
        inherited = [held, *(_in_memory(content) for content in files)]

        def prepare() -> None:
            if join is not None:
                join()
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)

        folder = tempfile.mkdtemp(prefix="async_rl.")
        try:
            process = subprocess.Popen(
                command(inherited),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                preexec_fn=prepare if join is not None or uid is not None else None,
                env=dict(environment),
                cwd=folder if uid is None else "/",
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(gone)
            shutil.rmtree(folder, ignore_errors=True)
            raise SetupFailed(str(error)) from None
        finally:
            for descriptor in inherited:
                os.close(descriptor)
        return cls(process, gone, folder)

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Raises Ended."""
        deadline = time.monotonic() + seconds
        self.write(pack(message), seconds)
        (size,) = HEADER.unpack(self._exactly(HEADER.size, deadline))
        try:
            answer = json.loads(self._exactly(size, deadline)) if size <= MAX_ANSWER else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Ended("ended")
        return cast("dict[str, Any]", answer)

    def write(self, data: bytes, seconds: float) -> None:
        """Raises Ended."""
        deadline, view = time.monotonic() + seconds, memoryview(data)
        while view:
            if not select.select([], [self._in], [], max(0.0, deadline - time.monotonic()))[1]:
                raise Ended("time")
            try:
                view = view[os.write(self._in, view) :]
            except BrokenPipeError:
                raise Ended("ended") from None

    def read_all(self, seconds: float) -> tuple[int, bytes, str]:
        """(exit code, standard output, the end of standard error) of one that ends by itself; else it is ended."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(EOFError, Ended):
            while True:
                self._more(deadline)
        self._wait_gone(deadline)
        said = self.end()
        return self._process.returncode, bytes(self._read), said

    def end(self) -> str:
        """Everything in there. What was on standard error.

        Raises:
            SetupFailed: something of it lives on.
        """
        for kill in (os.kill, os.killpg):  # the group: in a sandbox the rest dies with its first process
            with contextlib.suppress(ProcessLookupError):
                kill(self._process.pid, signal.SIGKILL)
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._err, 1 << 16)
        self._process.wait()
        ended = self._wait_gone(time.monotonic() + END_S)
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        os.close(self._gone)
        shutil.rmtree(self._folder, ignore_errors=True)
        if not ended:
            raise SetupFailed(f"a sandbox did not end within {END_S:.0f} s of being killed")
        return said.decode(errors="replace").strip()[-SAID:]

    def _wait_gone(self, deadline: float) -> bool:
        return bool(select.select([self._gone], [], [], max(0.0, deadline - time.monotonic()))[0])

    def _exactly(self, size: int, deadline: float) -> bytes:
        try:
            while len(self._read) < size:
                self._more(deadline)
        except EOFError:
            raise Ended("ended") from None
        found = bytes(self._read[:size])
        del self._read[:size]
        return found

    def _more(self, deadline: float) -> None:
        if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise Ended("time")
        part = os.read(self._out, 1 << 16)
        if not part:
            raise EOFError
        self._read += part


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("async_rl")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
