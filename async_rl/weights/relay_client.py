"""The generator's end of the relay: resumes what was cut off, checks every bucket, prefers deltas that are fewer bytes.

Blocks: it belongs into a thread of its own. A connection that brings nothing for a while is given up and the rest asked
for on a new one, until nothing has come for `timeout_s`.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.checksum import BUCKET_BYTES, bucket_checksum
from async_rl.weights.delta import Delta, apply
from async_rl.weights.errors import WeightsCorrupt, WeightsError, WeightsGone
from async_rl.weights.header import name
from async_rl.weights.weight_file import LENGTH, Manifest, decode_head, head_bytes
from async_rl.wire.messages import WeightsAnnounce, WeightsId

ATTEMPTS = 3
"""Of a bucket that arrives damaged."""
CONNECTIONS = 4
"""At least so many are tried before nothing has come for the whole deadline."""
PAUSE_S = (0.05, 1.0)
"""Between connections that brought nothing, doubling from the first to the second."""
PIECE = 256 << 10
"""Bytes read at a time: at most so many are asked for again."""

T = TypeVar("T")


class _Gone(Exception):
    """The relay has other files by now."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file of the relay."""

    name: str
    weights: WeightsId
    base: WeightsId | None
    nbytes: int


class RelayClient:
    """`fetch` in one thread, `interrupt` from any. A snapshot stays valid until the second `fetch` after it."""

    def __init__(self, layout: Layout, *, timeout_s: float = 30.0) -> None:
        self._layout, self._timeout_s = layout, timeout_s
        self._staging: list[Tensor | None] = [None, None]
        """What was fetched last, and what is written next."""
        self.fetched: Snapshot | None = None
        """The last one; None after a damaged one."""
        self._stopped = threading.Event()
        self._connection: http.client.HTTPConnection | None = None
        self.received = 0
        """Bytes, of files, so far."""
        self.deltas = 0
        """Sets that came as deltas."""

    def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        """The newest weights of the relay, which may be newer than announced.

        Raises:
            WeightsGone: what was announced is not there any more, nor anything newer.
            WeightsMismatch: they are of another model.
            WeightsCorrupt: a bucket came damaged several times, or the whole is not what its checksum says.
            WeightsError: nothing has come for `timeout_s`, or the relay refuses us, or its files were removed.
        """
        source = _Source(announce, self._timeout_s, self._stopped, self._opened)
        try:
            return self._fetch_newest(source, announce)
        finally:
            source.close()

    def _fetch_newest(self, source: _Source, announce: WeightsAnnounce) -> Snapshot:
        gone: list[_Listed] = []
        while True:
            files = source.index()
            newest = files[-1] if files else None
            if newest is None or newest.weights < announce.weights:
                raise WeightsGone(f"weights {name(announce.weights)} are not at the relay: newer ones are on their way")
            if files == gone:
                raise WeightsError(f"the relay at {announce.location} lists {newest.name} and does not have it")
            try:
                return self._fetch(source, files)
            except _Gone:
                gone = files  # replaced while it was fetched: there are newer ones, and we have got on
            except WeightsCorrupt:
                self.fetched = None  # next time without deltas
                raise

    def interrupt(self) -> None:
        """`fetch` ends with an error soon."""
        self._stopped.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _opened(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def _fetch(self, source: _Source, files: list[_Listed]) -> Snapshot:
        newest = files[-1]
        chain = _chain(files, None if self.fetched is None else self.fetched.weights)
        if chain:
            return self._fetch_deltas(source, chain)
        into = self._empty(1)
        manifest = source.download(newest, lambda manifest: self._place(manifest, into))
        return self._finished(manifest, into)

    def _fetch_deltas(self, source: _Source, chain: list[_Listed]) -> Snapshot:
        payload = self._staging[0]
        assert payload is not None
        manifest: Manifest | None = None
        for index, listed in enumerate(chain):
            buffer: list[Tensor] = []

            def place(manifest: Manifest, buffer: list[Tensor] = buffer) -> Tensor:
                buffer.append(torch.empty(manifest.layout.nbytes, dtype=torch.uint8))
                return buffer[0]

            manifest = source.download(listed, place)
            delta = Delta(manifest.layout, buffer[0])
            payload = apply(delta, payload, self._empty(1) if index == 0 else payload, self._layout.width)
        assert manifest is not None
        snapshot = self._finished(manifest, payload)
        self.deltas += 1
        return snapshot

    def _finished(self, manifest: Manifest, payload: Tensor) -> Snapshot:
        manifest.header.check_layout(self._layout)
        manifest.header.check_payload(payload)
        self._staging.reverse()
        self.received += manifest.file_bytes
        self.fetched = Snapshot(manifest.header.weights, self._layout.views(payload))
        return self.fetched

    def _place(self, manifest: Manifest, into: Tensor) -> Tensor:
        manifest.header.check_layout(self._layout)
        return into

    def _empty(self, index: int) -> Tensor:
        found = self._staging[index]
        if found is None:
            found = self._staging[index] = torch.empty(self._layout.nbytes, dtype=torch.uint8)
        return found


def _chain(files: list[_Listed], held: WeightsId | None) -> list[_Listed]:
    """Deltas that lead from what we hold to the newest; empty where they do not, or are more bytes than the whole."""
    *deltas, newest = files
    start = next((index for index, delta in enumerate(deltas) if delta.base == held), None)
    if held is None or start is None:
        return []
    chain = deltas[start:]
    joined = all(after.base == before.weights for before, after in itertools.pairwise(chain))
    fewer = sum(delta.nbytes for delta in chain) < newest.nbytes
    return chain if joined and fewer and chain[-1].weights == newest.weights else []


class _Source:
    """One relay, for one fetch."""

    def __init__(
        self,
        announce: WeightsAnnounce,
        timeout_s: float,
        stopped: threading.Event,
        opened: Callable[[http.client.HTTPConnection], None],
    ) -> None:
        self._what, self._token, self._url = name(announce.weights), announce.token, announce.location
        address = urllib.parse.urlsplit(announce.location)
        self._host, self._port = address.hostname or "", address.port or 80
        self._timeout_s, self._stopped, self._opened = timeout_s, stopped, opened
        self._connection: http.client.HTTPConnection | None = None
        self._last_byte = time.monotonic()
        self._pause_s = PAUSE_S[0]

    def index(self) -> list[_Listed]:
        """Deltas, then the newest whole set; empty where there is nothing yet."""
        body = self._persist(lambda: self._request("/weights", {}).read())
        try:
            return [
                _Listed(one["name"], WeightsId(*one["weights"]), one["base"] and WeightsId(*one["base"]), one["bytes"])
                for one in json.loads(body)["files"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"what answers at {self._url} is no relay of weights: {error}") from None

    def download(self, listed: _Listed, place: Callable[[Manifest], Tensor]) -> Manifest:
        """One file, its payload into the tensor that `place` returns for its manifest; every bucket checked.

        Raises:
            _Gone: there are newer ones.
        """
        length = bytearray(LENGTH.size)
        self._read(listed, 0, memoryview(length))
        head = bytearray(head_bytes(bytes(length)))
        self._read(listed, 0, memoryview(head))
        manifest = decode_head(bytes(head))
        if (manifest.header.weights, manifest.base) != (listed.weights, listed.base):
            raise WeightsCorrupt(f"{listed.name} holds weights {name(manifest.header.weights)}")
        payload = place(manifest)
        data = payload.numpy().data[: manifest.layout.nbytes]
        self._read(listed, manifest.start, data)
        for index, expected in enumerate(manifest.buckets):
            first = index * BUCKET_BYTES
            bucket = data[first : first + BUCKET_BYTES]
            attempts = 1
            while bucket_checksum(bucket) != expected:
                if attempts == ATTEMPTS:
                    raise WeightsCorrupt(f"{listed.name}: bucket {index + 1} came damaged {ATTEMPTS} times")
                attempts += 1
                self._read(listed, manifest.start + first, bucket)
        return manifest

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, listed: _Listed, at: int, into: memoryview) -> None:
        """Bytes [at, at + len(into)) of a file, over as many connections as it takes."""
        got = 0

        def attempt() -> None:
            nonlocal got
            if got == len(into):
                return
            wanted = f"bytes={at + got}-{at + len(into) - 1}"
            response = self._request(f"/weights/{listed.name}", {"Range": wanted})
            while got < len(into):
                count = response.readinto(into[got : got + PIECE])
                if not count:
                    raise ConnectionError("it was cut off")
                got += count
                self._came()

        self._persist(attempt)

    def _request(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        if self._connection is None:
            timeout_s = self._timeout_s / CONNECTIONS
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
            self._opened(self._connection)
            self._connection.connect()
            if self._stopped.is_set():  # whoever set it may have found no socket to shut
                raise ConnectionError("the receiver was closed")
        self._connection.request("GET", path, headers=headers | {"Authorization": f"Bearer {self._token}"})
        response = self._connection.getresponse()
        match response.status:
            case 200 | 206 if (response.status == 206) == ("Range" in headers):
                return response
            case 404:
                response.read()
                raise _Gone
            case status if status >= 500:
                raise ConnectionError(f"it answers {status} {response.reason}")
            case status:
                raise WeightsError(f"the relay at {self._url} answers {status} {response.reason}")

    def _came(self) -> None:
        self._last_byte, self._pause_s = time.monotonic(), PAUSE_S[0]

    def _persist(self, attempt: Callable[[], T]) -> T:
        while True:
            if self._stopped.is_set():
                raise WeightsError(f"weights {self._what}: the receiver was closed")
            try:
                result = attempt()
                self._came()
                return result
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if time.monotonic() - self._last_byte > self._timeout_s:
                    raise WeightsError(
                        f"weights {self._what}: nothing came from the relay at {self._url} for "
                        f"{self._timeout_s:.0f} s: {error or type(error).__name__}"
                    ) from error
            self._stopped.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, PAUSE_S[1])
