"""What goes to a grader's process and comes back, one length-prefixed msgpack frame each.

parent -> Setup;   child -> Ready | Refused (and exits)
parent -> Compare | RunProgram;   child -> Verdict | Refused        ... until the parent closes
"""

from __future__ import annotations

import socket
import struct
from typing import Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["math", "code"]

HEADER = struct.Struct(">I")
MAX_FRAME = 256 << 20


class Setup(msgspec.Struct, frozen=True, tag=True):
    kind: Kind
    memory_mb: int
    """Of a math grader's process; of all processes of a program together."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process takes jobs."""


class Compare(msgspec.Struct, frozen=True, tag=True):
    """Is a formula equal to one of others?"""

    answer: str
    right: list[str]


class Verdict(msgspec.Struct, frozen=True, tag=True):
    value: float
    reason: str
    detail: str = ""
    passed: int = 0
    total: int = 1


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No verdict: nothing was learnt about the answer."""

    reason: str
    of_the_user: bool = False
    """What was asked for is wrong or missing here (a UserError)."""


ToChild = Setup | Compare
FromChild = Ready | Verdict | Refused
to_child = msgspec.msgpack.Decoder(ToChild)
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
