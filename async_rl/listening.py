"""Addresses of this machine that a recipe names: a socket that listens there, or a UserError that names the field."""

from __future__ import annotations

import errno
import os
import socket

from async_rl.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)
"""What the system says where the address is ours and the port is not."""


def listen(host: str, port: int = 0, *, field: str, owner: str, port_field: str = "") -> socket.socket:
    """A socket that listens. port: 0 = any free one. field, port_field: what the recipe calls the two. owner: whose
    machine it is.

    Raises:
        UserError: this machine has no such address, or may not listen at the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address, family=family)
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else getattr(error, "strerror", str(error))
        if port_field and number in OF_THE_PORT:
            raise UserError(
                f"{port_field} = {port}: cannot listen on {host} ({reason}); write a free port, or 0 for any"
            ) from None
        raise UserError(
            f"{field} = {host!r}: cannot listen there ({reason}); write an address of the {owner}'s machine"
        ) from None
