"""Pure: which weights sampled which token, from the ticks at which weights were swapped.

An engine counts ticks: every decode step adds one, and every sequence in a slot gets exactly one token per tick. So one
short log of swaps gives the spans of every sequence, and nothing is recorded per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.wire.messages import VersionSpan


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sequence entered the engine."""

    tick: int
    """Tick of its token 0; token t was sampled at tick + t."""
    version: int
    """Weights that sampled token 0 and wrote the first KV."""
    swap: int
    """How many swaps had happened by then."""


class VersionLog:
    """The versions that were live, one small record per swap."""

    def __init__(self) -> None:
        self._swaps: list[tuple[int, int]] = []  # (tick, version): tokens of later ticks were sampled by `version`

    def swap(self, tick: int, version: int) -> None:
        """`version` is live from now on; `tick` was the last one before it."""
        self._swaps.append((tick, version))

    def enter(self, tick: int) -> Entry:
        """A sequence whose token 0 is sampled at `tick`, by the live weights."""
        return Entry(tick, self._swaps[-1][1], len(self._swaps))

    def spans(self, entry: Entry, first: int, last: int) -> list[VersionSpan]:
        """Spans of tokens [first, last) of a sequence; positions count from `first`."""
        spans: list[VersionSpan] = []
        start, version = first, entry.version
        for tick, next_version in self._swaps[entry.swap :]:
            boundary = tick + 1 - entry.tick  # the first token after this swap
            if boundary >= last:
                break
            if boundary > start and next_version != version:
                spans.append(VersionSpan(start - first, boundary - first, version, entry.version))
                start = boundary
            version = next_version
        if last > start:
            spans.append(VersionSpan(start - first, last - first, version, entry.version))
        return spans
