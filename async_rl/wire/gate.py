"""Who may come in: CURVE with an allow-list, on the controller's side of a stream.

ZeroMQ asks over an inproc socket (ZAP, RFC 27) before a peer gets a connection. A thread of its own answers, so that a
handshake never waits for the controller's loop; it ends with the socket's context.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

ZAP = "inproc://zeromq.zap.01"
VERSION = b"1.0"
MAX_COMPLAINTS = 100
"""Lines about peers that were not let in; somebody who keeps trying does not fill the disk."""
FAILED = zmq.Event.HANDSHAKE_FAILED_PROTOCOL

log = logging.getLogger(__name__)


class Gate:
    """Put it up before the socket binds; it lets in who holds the secret key that belongs to `allowed`, under the name
    of the role.

    Args:
        secret: of the controller, in Z85.
        allowed: public key of the peers of this stream, in Z85.
    """

    def __init__(self, socket: zmq.Socket[Any], *, role: str, secret: str, allowed: str) -> None:
        self._role, self._allowed = role.encode(), z85.decode(allowed)
        self._complaints = 0
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, self._role)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(socket.context.underlying)
        self._requests = context.socket(zmq.REP)
        self._requests.bind(ZAP)
        monitor = f"inproc://gate-{role}"
        socket.monitor(monitor, FAILED)
        self._failures = context.socket(zmq.PAIR)
        self._failures.connect(monitor)
        threading.Thread(target=self._watch, name=f"gate-{role}", daemon=True).start()

    def _watch(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._failures, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    if socket is self._requests:
                        self._requests.send_multipart(self._answer(self._requests.recv_multipart()))
                    else:
                        parse_monitor_message(self._failures.recv_multipart())
                        self._complain("a peer that does not know the controller's key, or uses none")
        except zmq.ContextTerminated:
            self._requests.close(0)
            self._failures.close(0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """[version, request id, domain, address, routing id, mechanism, key] -> [version, request id, status, text,
        user id, metadata]."""
        version, number, domain, address, _, mechanism, *credentials = request
        let_in = (version, domain, mechanism, credentials) == (VERSION, self._role, b"CURVE", [self._allowed])
        if not let_in:
            self._complain(f"{address.decode(errors='replace')}, whose key is not of this run or of another role")
        status, text = (b"200", b"OK") if let_in else (b"400", b"not a key of this run")
        return [VERSION, number, status, text, self._role if let_in else b"", b""]

    def _complain(self, who: str) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            last = "; no more such lines from now on" if self._complaints == MAX_COMPLAINTS else ""
            log.warning("%s stream: did not let in %s%s", self._role.decode(), who, last)
