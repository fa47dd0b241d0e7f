"""Length-prefixed JSON over a file descriptor."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

HEADER = struct.Struct(">I")


def read(descriptor: int, size: int) -> bytes | None:
    """Exactly so much, and not a byte ahead: what comes later may not be in memory when the program is forked. None:
    the other end is closed."""
    parts: list[bytes] = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(descriptor: int) -> Any:
    """None: the other end is closed."""
    header = read(descriptor, HEADER.size)
    body = None if header is None else read(descriptor, HEADER.unpack(header)[0])
    return None if body is None else json.loads(body)


def pack(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def send(descriptor: int, message: Any) -> None:
    view = memoryview(pack(message))
    while view:
        view = view[os.write(descriptor, view) :]
