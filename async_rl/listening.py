"""Addresses of this machine that a recipe names: a socket that listens there, or a UserError that names the field."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from async_rl.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)
"""What the system says where the address is ours and the port is not."""


def is_loopback(host: str) -> bool:
    """Whether an address, as a recipe has it, is one that only its own machine reaches."""
    return host in LOOPBACK or ((address := literal(host)) is not None and address.is_loopback)


def literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None: it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def bracketed(address: str) -> str:
    """As it stands in front of a port."""
    return f"[{address}]" if ":" in address else address


def numeric(host: str, *, field: str, owner: str) -> str:
    """The address that a name of this machine stands for.

    Raises:
        UserError: it stands for none, or for one that other machines do not reach though the name promises it.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{field} = {host!r}: cannot listen there ({reason}); write an address of the {owner}'s machine"
        ) from None
    address = str(min(found, key=lambda info: info[0] != socket.AF_INET)[4][0])
    if is_loopback(address) and not is_loopback(host):
        raise UserError(
            f"{field} = {host!r}: on this machine it means {address}, which no other machine reaches; write the "
            "address of an interface (ip -brief address), or 127.0.0.1"
        )
    return address


def listen(host: str, port: int = 0, *, field: str, owner: str, port_field: str = "") -> socket.socket:
    """A socket that listens. port: 0 = any free one. field, port_field: what the recipe calls the two. owner: whose
    machine it is.

    Raises:
        UserError: this machine has no such address, or may not listen at the port.
    """
    address = numeric(host, field=field, owner=owner)
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError as error:
        reason = error.strerror if error.errno is None else os.strerror(error.errno)
        if port_field and error.errno in OF_THE_PORT:
            raise UserError(
                f"{port_field} = {port}: cannot listen on {host} ({reason}); write a free port, or 0 for any"
            ) from None
        raise UserError(
            f"{field} = {host!r}: cannot listen there ({reason}); write an address of the {owner}'s machine"
        ) from None
