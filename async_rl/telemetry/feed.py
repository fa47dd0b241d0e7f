"""What the journal tells, for any number of browsers: server-sent events, put together once for all of them.

    journal = DirectoryJournal(directory, feed.tell)
    feed.look = lambda: ...                 # what there is to see now; asked only while somebody watches
    async for event in feed.events(start):  # one browser

Rows of steps are gathered, so that a run of fifty steps a second sends four events. Nothing is kept for a browser that
does not read: it loses its place, comes again, and is told everything anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from async_rl.telemetry.journal import Row
from async_rl.telemetry.progress import one_line, summary_line

INTERVAL_S = 0.25
"""Between two events, unless something else than a step happens."""
MAX_WAITING = 32
"""Events that a browser may be behind."""
MAX_MESSAGES = 200


def encode(kind: str, data: Row) -> bytes:
    """One event. NaN, which JSON does not have, becomes null; line breaks within strings are escaped by JSON."""
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


class Feed:
    """One per controller, fed and read on its loop.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.look: Callable[[list[Row]], Row] = lambda rows: {}
        """Called with the rows of the steps since the last call; returns what is new, and the state of now."""
        self.pulse: Row = {}
        """The last one."""
        self.messages: deque[Row] = deque(maxlen=MAX_MESSAGES)
        self.ended = ""
        """One sentence, when the run is over."""
        self._clock = clock
        self._queues: set[asyncio.Queue[bytes | None]] = set()
        self._rows: list[Row] = []
        self._evaluations: list[Row] = []
        self._said: list[Row] = []
        self._sent = float("-inf")

    def tell(self, kind: str, data: Any) -> None:
        """As DirectoryJournal tells it."""
        match kind:
            case "step":
                self._rows.append(data)
            case "evaluation":
                self._evaluations.append(data)
            case "pulse":
                self.pulse = data
            case "say":
                self._said.append({"at": time.time(), "text": one_line(data)})
                self.messages.append(self._said[-1])
            case "summary":
                self.ended = summary_line(data)
            case _:
                return
        if kind != "step" or self._clock() - self._sent >= INTERVAL_S:
            self._send()

    async def events(self, start: Callable[[], Row]) -> AsyncIterator[bytes]:
        """`start()` at once, then what happens; ends with the feed, or when this reader is too slow."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_WAITING)
        self._send()  # what was told before belongs to the start, and not behind it
        queue.put_nowait(encode("start", start()))
        self._queues.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    def close(self, sentence: str) -> None:
        """The controller leaves. sentence: how the run stands, if it did not end by itself."""
        self.ended = self.ended or sentence
        self._send()
        for queue in self._queues:
            _last(queue)
        self._queues.clear()

    def _send(self) -> None:
        rows, evaluations, said = self._rows, self._evaluations, self._said
        self._rows, self._evaluations, self._said = [], [], []
        self._sent = self._clock()
        if not self._queues:
            return
        told = {"new_evaluations": evaluations, "said": said, "ended": self.ended}
        event = encode("update", self.look(rows) | told)
        for queue in list(self._queues):
            if queue.full():
                self._queues.discard(queue)
                _last(queue)
            else:
                queue.put_nowait(event)


def _last(queue: asyncio.Queue[bytes | None]) -> None:
    """Whoever reads from it comes to its end."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(None)
