"""Who may use the admin endpoint. In front of every route, whatever it is.

what comes                                           | answer
-----------------------------------------------------+-----------------------------------------------------------
for a name that is not ours (a page whose name was   | 403
    made to mean our address: DNS rebinding)         |
from a page of somebody else (it can send, though    | 403
    not read: cross-site request forgery)            |
without the token, where one is asked for            | 401: as `Authorization: Bearer TOKEN`, or, in a browser, as the
                                                     | password of any name, which it keeps for this address alone
"""

from __future__ import annotations

import base64
import binascii
import hmac
import socket
import urllib.parse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from async_rl.listening import literal

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHALLENGES = ("Bearer", 'Basic realm="async_rl", charset="UTF-8"')
"""A header each: of several in one, Chromium reads the first."""


class Access:
    """A middleware.

    Args:
        host: what we listen on, as the recipe has it.
        token: "": nobody is asked for one.
        token_file: where who is asked for it finds it.
    """

    def __init__(self, host: str, token: str = "", token_file: Path | None = None) -> None:
        self._names = {host.lower(), socket.gethostname().lower(), "localhost"}
        self._token, self._token_file = token.encode(), token_file

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not self._ours(host):
            names = ", ".join(sorted(self._names))
            return refused(403, f"Host: {host}: this is no name of this machine; use its address, or one of {names}")
        if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
            return refused(403, f"Origin: {origin}: a page of another site may not do that")
        if self._token and not hmac.compare_digest(_given(request.headers.get("Authorization", "")), self._token):
            says = f"send Authorization: Bearer TOKEN, or TOKEN as a password; it is in {self._token_file}"
            answer = refused(401, says)
            for challenge in CHALLENGES:
                answer.headers.add("WWW-Authenticate", challenge)
            return answer
        return await handler(request)

    def _ours(self, host: str) -> bool:
        """Any address will do: no page elsewhere is at an address that leads here."""
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or literal(name) is not None


def refused(status: int, reason: str) -> web.Response:
    body: dict[str, Any] = {"error": reason}
    return web.json_response(body, status=status)


def _given(authorization: str) -> bytes:
    """The token of a header; empty where there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
