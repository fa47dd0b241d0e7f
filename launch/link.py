"""What the head of a cluster and its other nodes say to each other: JSON over one WebSocket per node.

A node knocks at the head and shows the key of the run directory, which whoever comes first makes: who cannot read it
does not belong to the run, and a node with another one does not see the same directory. The end of the connection is
to a node what the end of the pipe is to a child (launch.child): it ends all it has started. Both ends send heartbeats,
so that a machine without power or network is noticed too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from async_rl.launch.process import Order

from async_rl.errors import UserError
from async_rl.telemetry.run_directory import RunDirectory

HEARTBEAT_S = 5.0
"""aiohttp gives each half as long again to be answered."""
MAX_MESSAGE_BYTES = 1 << 24
PATH = "/node"
KEY, ADDRESS = "cluster.key", "cluster.json"
JOINS = -1
"""Instead of a rank."""


class Arrive(msgspec.Struct, frozen=True, tag=True):
    """A node: its first message."""

    rank: int
    """0 is the head itself; JOINS: it brings generators to a run that is at work."""
    start: str
    """Of which start of the run it is part, such as Slurm's job id and restart count."""
    hostname: str
    gpus: list[str]
    generators: int
    """JOINS only: how many it offers."""


class Told(msgspec.Struct, frozen=True, tag=True):
    """A service of a node has told something (launch.child)."""

    name: str
    kind: str
    data: Any


class Gone(msgspec.Struct, frozen=True, tag=True):
    """A service of a node has ended."""

    name: str
    code: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Somebody asks a node to stop, and so the whole run; who JOINS just leaves. warned: by SIGUSR1."""

    warned: bool


class Start(msgspec.Struct, frozen=True, tag=True):
    order: Order


class Kill(msgspec.Struct, frozen=True, tag=True):
    name: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """again: it may be otherwise in a moment."""

    reason: str
    again: bool


class Over(msgspec.Struct, frozen=True, tag=True):
    """The run has ended, for now or for good: exit with this code. reason: empty where there is nothing to say."""

    code: int
    reason: str = ""


ToHead: TypeAlias = Arrive | Told | Gone | Stop
ToNode: TypeAlias = Start | Kill | Refused | Over


def key_of(directory: RunDirectory) -> str:
    """The key of a run directory, made if need be; of several who make it at once all get the same.

    Raises:
        UserError: it cannot be read or written.
    """
    path = directory.path / KEY
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
        return path.read_text().strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write a --run-dir that all nodes share") from None


def _make(path: Path) -> None:
    """By a link, which is atomic on network file systems too."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{KEY}.") as mine:  # mode 0600
        mine.write(secrets.token_urlsafe(32))
        mine.flush()
        os.fsync(mine.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(mine.name, path)
