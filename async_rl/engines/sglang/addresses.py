"""Whether servers can reach the address that weights come from, as far as that can be known beforehand."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from async_rl.errors import UserError
from async_rl.listening import LOOPBACK


def check_host(host: str, attach: Sequence[str]) -> None:
    """Raises UserError: a server on another machine would look for weights on its own."""
    if host not in LOOPBACK:
        return
    for url in attach:
        if not _ours(urlsplit(url).hostname or ""):
            raise UserError(
                f"generator.sglang.host = {host!r}: {url} is another machine, which reaches nobody but itself there; "
                "write the address of the generator's machine as that one reaches it"
            )


def _ours(name: str) -> bool:
    """One can listen there. A name that nobody knows says nothing."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return True
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(address)
                return True
            except OSError:
                continue
    return False
