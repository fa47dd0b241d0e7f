"""Why a controller does not let us in: ZeroMQ itself says nothing, and tries again for ever or never again.

what a client sees                      | what it means
----------------------------------------+---------------------------------------------------------------------------
an answer: refused                      | the controller does not accept our key; ZeroMQ does not try again
the connection closes in the handshake  | it uses keys and we do not, or we do and it does not, or its key is another:
                                        | what its greeting says, and whether it goes on
the connection closes before a greeting | nobody is behind that address (a tunnel, a proxy): it may come
"""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from async_rl.errors import UserError
from async_rl.run_secrets import ClientKeys

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01"
"""As much of ours (ZMTP 3.1, RFC 37) as makes the other end send all of its own: signature and version."""
GREETING_BYTES = 64
MECHANISM = slice(12, 32)
GREETING_TIMEOUT_S = 5.0
PROOF = 5
"""Handshakes in a row that fail after a greeting that was as it should be: then it is the key."""
EVENTS = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class Handshakes:
    """Of one client. `await watch()` until the socket closes.

    address: tcp://host:port. keys: None = it uses none.
    """

    def __init__(self, socket: zmq.asyncio.Socket, address: str, keys: ClientKeys | None) -> None:
        self._controller = f"the controller at {address}"
        self._address, self._keys = address, keys
        self._monitor = socket.get_monitor_socket(EVENTS)
        self._failures: int | None = None
        """Since the greeting that was as it should be."""

    def close(self) -> None:
        self._monitor.close(0)

    async def watch(self) -> None:
        """Raises UserError: no handshake will succeed."""
        while True:
            match parse_monitor_message(await self._monitor.recv_multipart())["event"]:
                case zmq.Event.MONITOR_STOPPED:
                    return
                case zmq.Event.HANDSHAKE_SUCCEEDED:
                    self._failures = None
                case zmq.Event.HANDSHAKE_FAILED_AUTH:
                    raise UserError(f"{self._controller} does not accept {self._key()}")
                case _:
                    await self._closed()

    async def _closed(self) -> None:
        if self._failures is not None:
            self._failures += 1
            if self._failures == PROOF:
                raise UserError(f"{self._controller} does not know {self._key()}")
            return
        theirs, ours = await mechanism(self._address), "NULL" if self._keys is None else "CURVE"
        if theirs is None:
            return
        if theirs == ours:
            self._failures = 0
            return
        what = "asks for keys, and this service uses none" if ours == "NULL" else "uses no keys, and this service does"
        raise UserError(
            f"{self._controller} {what}: give both the same controller.host and [security]; config.json of the run "
            "directory has those of the controller"
        )

    def _key(self) -> str:
        if self._keys is None:
            return "this service: write the address of one of its streams after --connect"
        return f"{self._keys.origin}: copy that file from its run directory, and name the folder with --secrets"


async def mechanism(address: str) -> str | None:
    """How a ZeroMQ socket wants to be spoken to, NULL or CURVE; None where there is none now.

    address: tcp://host:port.
    """
    where = urllib.parse.urlsplit(address)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            writer.write(GREETING)
            greeting = await reader.readexactly(GREETING_BYTES)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    signature, name = greeting[0] == 0xFF and greeting[9] == 0x7F, greeting[MECHANISM]
    return name.rstrip(b"\0").decode("ascii", "replace") if signature else None
