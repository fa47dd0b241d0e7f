"""What goes to a grader's process and comes back, one length-prefixed msgpack frame each.

parent -> Setup;   child -> Ready | Refused (and exits)
parent -> Compare | RunProgram;   child -> Verdict | Refused        ... until the parent closes
"""

from __future__ import annotations

import math
import socket
import struct
from typing import Literal, TypeAlias

import msgspec

from async_rl.config import Rewards

Kind: TypeAlias = Literal["math", "code"]

CHECK = "check"
"""What the child gets instead of its parent's id: it only looks at the machine, and no frames go anywhere."""
HEADER = struct.Struct(">I")
MAX_FRAME = 256 << 20


class Setup(msgspec.Struct, frozen=True, tag=True):
    kind: Kind
    settings: Rewards


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process takes jobs."""


class Compare(msgspec.Struct, frozen=True, tag=True):
    """Is a formula equal to one of others?"""

    answer: str
    right: list[str]


class Case(msgspec.Struct, frozen=True):
    """What a script reads, and what it has to write."""

    stdin: str
    stdout: str


class RunProgram(msgspec.Struct, frozen=True, tag=True):
    """Does a program pass its tests? There are cases, or asserts."""

    program: str
    time_limit_s: float
    """Seconds of CPU that one test may take; of the clock three times as many, and one."""
    cases: list[Case] = []
    asserts: list[str] = []
    """Sources of tests, run in order in one namespace."""
    to_the_end: bool = False
    """Also after a test that failed."""

    @property
    def num_tests(self) -> int:
        return len(self.cases) + len(self.asserts)

    @property
    def cpu_s(self) -> int:
        """Of one process; functions that asserts call live through all of them."""
        return math.ceil(self.time_limit_s) * max(1, len(self.asserts))

    @property
    def wall_s(self) -> float:
        """Of one test."""
        return 3 * self.time_limit_s + 1


class Verdict(msgspec.Struct, frozen=True, tag=True):
    value: float
    reason: str
    """As in Grade."""
    detail: str = ""
    passed: int = 0
    total: int = 1


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No verdict: nothing was learnt about the answer."""

    reason: str
    of_the_user: bool = False
    """What was asked for is wrong or missing here (a UserError)."""


class Asked(msgspec.Struct, frozen=True):
    """What a reward service is asked over HTTP."""

    job: Compare | RunProgram
    deadline_s: float
    """From when a grader has the job."""


ToChild = Setup | Compare | RunProgram
FromChild = Ready | Verdict | Refused
to_child = msgspec.msgpack.Decoder(ToChild)
asked = msgspec.msgpack.Decoder(Asked)
from_child = msgspec.msgpack.Decoder(FromChild)


def frame(message: ToChild | FromChild) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


def receive(connection: socket.socket) -> ToChild | None:
    """In the child. None: the parent has closed."""
    header = _exactly(connection, HEADER.size)
    body = None if header is None else _exactly(connection, HEADER.unpack(header)[0])
    return None if body is None else to_child.decode(body)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
