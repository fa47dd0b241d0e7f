"""What every service shares with whoever started it: its options, and the pipe to its parent.

Up the pipe go JSON lines ({"kind": "ready", "data": ...}); down comes at most one line, `stop SECONDS`. When the
parent's end closes, for whatever reason, the child exits: a thread of its own waits for that, and PDEATHSIG is the
backup. No orphan, ever. Signals that a scheduler or a terminal sends to every process of a job are the parent's to
obey, which ends its children in order. Without a parent (one service per process, started by hand) lines are printed,
nothing is waited for, and signals ask the controller to stop in order, and end the others as always.
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
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config import Run
from async_rl.run_secrets import ClientKeys, Role, RunSecrets

PIPE_VARIABLE = "ASYNC_RL_PARENT_FD"
PR_SET_PDEATHSIG = 1
STOP_VARIABLE, STOP_BY_HAND_S = "ASYNC_RL_STOP_S", 20.0
"""How long the controller may take for the last checkpoint when nobody is there to say it, and what says otherwise."""
OBEYED_BY_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


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
        self._stop: Callable[[float], object] | None = None
        self._stop_within_s: float | None = None
        """What came with `stop`."""
        if self._socket is not None:
            for number in OBEYED_BY_THE_PARENT:
                signal.signal(number, _pass)  # a handler and not SIG_IGN, which processes of ours would inherit
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def tell(self, kind: str, data: Any = None) -> None:
        line = json.dumps({"kind": kind, "data": data})
        with self._lock:
            if self._socket is None:
                if kind != "pulse":  # four a second, for a view that is redrawn
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

    def on_stop(self, stop: Callable[[float], object]) -> None:
        """Called on another thread, with the seconds it may take, when the parent asks for an orderly end; at once if
        it already has. Without a parent: by Ctrl-C, SIGTERM and their like, in the main thread."""
        if self._socket is None:
            within_s = float(os.environ.get(STOP_VARIABLE, STOP_BY_HAND_S))
            for number in OBEYED_BY_THE_PARENT:
                signal.signal(number, lambda number, frame: stop(within_s))
            return
        with self._lock:
            self._stop, within_s = stop, self._stop_within_s
        if within_s is not None:
            stop(within_s)

    def _listen(self) -> None:
        assert self._socket is not None
        while line := self._socket.recv(64):
            within_s = float(line.split()[1])
            with self._lock:
                self._stop_within_s, stop = within_s, self._stop
            if stop is not None:
                stop(within_s)
        sys.stderr.flush()
        os._exit(1)


def _pass(number: int, frame: types.FrameType | None) -> None:
    """See OBEYED_BY_THE_PARENT."""
