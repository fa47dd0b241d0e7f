"""What every service shares with whoever started it: its options, and the pipe to its parent.

Up the pipe go JSON lines ({"kind": "ready", "data": ...}); down comes at most one line, `stop`. When the parent's end
closes, for whatever reason, the child exits: a thread of its own waits for that, and PDEATHSIG is the backup. No
orphan, ever. Without a parent (one service per process on a cluster) lines are printed and nothing is waited for.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config import Run
from async_rl.run_secrets import ClientKeys, Role, RunSecrets

PIPE_VARIABLE = "ASYNC_RL_PARENT_FD"
PR_SET_PDEATHSIG = 1
EXIT_AGAIN = 75
"""Whoever started this service should start it again: the controller had given up on it or is a new one, or code of the
environment blocks it."""


def settle_heap() -> None:
    """What is on the heap now stays: the garbage collector need not walk through it again (a full collection over the
    modules of torch and transformers stops a process for 50 ms). A full collection comes due whenever a quarter more
    objects live than at the last, which in a heap that now looks empty is twice a second, 8 ms each time in a busy
    controller: one is made in a hundred of those. Young objects are looked at as often as before.
    """
    gc.collect()
    gc.freeze()
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 100 * old)


@dataclass(frozen=True)
class ServeOptions:
    run_dir: Path
    name: str
    """`generator-0`; stable across restarts."""
    connect: str = ""
    """Address of the stream this service joins; the controller has none."""
    secrets_folder: Path | None = None
    """Where the run's keys and token are, if not in the run directory."""

    @property
    def secrets(self) -> RunSecrets:
        return RunSecrets(self.secrets_folder or self.run_dir / "secrets")

    def keys(self, run: Run, role: Role) -> ClientKeys | None:
        """None where the controller asks for none. Raises UserError."""
        return self.secrets.client(role) if run.secured else None


class Parent:
    """The process that started this one."""

    def __init__(self) -> None:
        descriptor = os.environ.pop(PIPE_VARIABLE, "")
        self._socket = socket.socket(fileno=int(descriptor)) if descriptor else None
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None
        self._stop_came = False
        if self._socket is not None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def tell(self, kind: str, data: Any = None) -> None:
        line = json.dumps({"kind": kind, "data": data})
        with self._lock:
            if self._socket is None:
                print(line, flush=True)
                return
            try:
                self._socket.sendall(line.encode() + b"\n")
            except OSError:
                os._exit(1)  # the parent is gone

    def ready(self, data: Any = None) -> None:
        """Everything is loaded."""
        settle_heap()
        self.tell("ready", data)

    def on_stop(self, stop: Callable[[], object]) -> None:
        """Called on another thread when the parent asks for an orderly end; at once if it already has."""
        with self._lock:
            self._stop = stop
            came = self._stop_came
        if came:
            stop()

    def _listen(self) -> None:
        assert self._socket is not None
        while self._socket.recv(64):
            with self._lock:
                self._stop_came, stop = True, self._stop
            if stop is not None:
                stop()
        sys.stderr.flush()
        os._exit(1)
