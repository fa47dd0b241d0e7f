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
        self._swaps: list[tuple[int, int, bool]] = []
        """(tick, version, recomputed): tokens of later ticks were sampled by `version`"""

    def swap(self, tick: int, version: int, *, recomputed: bool = False) -> None:
        """`version` is live from now on; `tick` was the last one before it. recomputed: it has written the whole KV
        cache anew; else that stays as it was."""
        self._swaps.append((tick, version, recomputed))

    def enter(self, tick: int) -> Entry:
        """A sequence whose token 0 is sampled at `tick`, by the live weights."""
        return Entry(tick, self._swaps[-1][1], len(self._swaps))

    def spans(self, entry: Entry, first: int, last: int) -> list[VersionSpan]:
        """Spans of tokens [first, last) of a sequence; positions count from `first`."""
        spans: list[VersionSpan] = []
        start, version, kv_version = first, entry.version, entry.version
        for tick, next_version, recomputed in self._swaps[entry.swap :]:
            boundary = tick + 1 - entry.tick  # the first token after this swap
            if boundary >= last:
                break
            next_kv_version = next_version if recomputed else kv_version
            if boundary > start and (next_version, next_kv_version) != (version, kv_version):
                spans.append(VersionSpan(start - first, boundary - first, version, kv_version))
                start = boundary
            version, kv_version = next_version, next_kv_version
        if last > start:
            spans.append(VersionSpan(start - first, last - first, version, kv_version))
        return spans
