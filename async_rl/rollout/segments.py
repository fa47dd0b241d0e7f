"""Pure: the calls of an episode as segments on the wire, and back.

A rollout is made durable while it runs. Whoever resumes it replays the episode: a call that had ended returns what was
recorded, one in which it was interrupted goes on where it stopped.

Calls are known by what they ask and not by their turn, because calls that overlap, or come from another process, need
not come in the same order again. What no call asks for again is worth nothing, and harms nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from async_rl.engines.protocol import Chunk
from async_rl.wire.messages import FinishReason, GroupLease, Segment, VersionSpan


def prompt_crc(prompt: Sequence[int]) -> int:
    """CRC-32 of a call's prompt as [n] little-endian int32."""
    return zlib.crc32(np.asarray(prompt, "<i4").tobytes())


def empty_chunk(finish_reason: FinishReason | None = None) -> Chunk:
    """No tokens."""
    return Chunk(0, np.empty(0, np.int32), np.empty(0, np.float32), [], finish_reason)


def join(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk of all, at least one, as the last one ended."""
    if len(chunks) == 1:
        return chunks[0]
    spans: list[VersionSpan] = []
    start = 0
    for chunk in chunks:
        spans += [shifted(span, start) for span in chunk.spans]
        start += len(chunk.tokens)
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
    return Chunk(chunks[-1].request_id, tokens, logprobs, spans, chunks[-1].finish_reason)


def first_tokens(chunk: Chunk, count: int, reason: FinishReason) -> Chunk:
    """The chunk, ended after `count` tokens."""
    spans = [
        VersionSpan(span.start, min(span.end, count), span.version, span.kv_version)
        for span in chunk.spans
        if span.start < count
    ]
    return Chunk(chunk.request_id, chunk.tokens[:count], chunk.logprobs[:count], spans, reason)


def shifted(span: VersionSpan, by: int) -> VersionSpan:
    return VersionSpan(span.start + by, span.end + by, span.version, span.kv_version)


@dataclass(slots=True)
class RecordedCall:
    """What earlier leases sampled in one call of the policy."""

    prompt: int
    """CRC-32 of what was asked."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None: the call was interrupted."""
        return self.chunks[-1].finish_reason if self.chunks else None


def recorded_calls(lease: GroupLease, member: int) -> dict[int, RecordedCall]:
    """Which call of the episode -> what the segments of the lease have of it. A call of which nothing is recorded, and
    a segment that does not join the one before it, are sampled again."""
    calls: dict[int, RecordedCall] = {}
    for segment in lease.segments:
        if segment.member != member:
            continue
        call = calls.setdefault(segment.call, RecordedCall(segment.prompt))
        if segment.start == call.num_tokens:
            tokens, logprobs = np.frombuffer(segment.tokens, "<i4"), np.frombuffer(segment.logprobs, "<f4")
            call.chunks.append(Chunk(0, tokens, logprobs, segment.spans, segment.finish_reason))
    return calls


@dataclass(slots=True)
class OpenCall:
    """A call of the policy whose last tokens are not durable yet."""

    index: int
    """Its number in the episode, which its random numbers depend on."""
    prompt: tuple[int, ...]
    crc: int
    """CRC-32 of the prompt."""
    recorded: list[Chunk] = field(default_factory=list[Chunk])
    """What earlier leases sampled in it."""
    durable: int = 0
    """Its sampled tokens that are in segments."""
    last: Chunk | None = None
    """How it ended, if that is not durable yet."""

    def segment(
        self, lease: GroupLease, member: int, chunk: Chunk, reason: FinishReason | None, *, yielded: bool = False
    ) -> Segment:
        """The next tokens, which are durable from now on."""
        start, self.durable = self.durable, self.durable + len(chunk.tokens)
        tokens, logprobs = chunk.tokens.tobytes(), chunk.logprobs.tobytes()
        return Segment(
            lease.group_id, member, self.index, start, self.crc, tokens, logprobs, chunk.spans, reason, yielded
        )


class CallNumbers:
    """Gives the calls of an episode their numbers: a call that asks what a recorded one asked takes that one's, another
    takes the number of calls before it, or the next that is free."""

    def __init__(self, recorded: Mapping[int, RecordedCall]) -> None:
        self._recorded = dict(sorted(recorded.items()))
        """Those that no call has asked for yet."""
        self._taken = set(recorded)
        self._begun = 0

    def begin(self, prompt: tuple[int, ...]) -> OpenCall:
        crc = prompt_crc(prompt)
        index = next((index for index, call in self._recorded.items() if call.prompt == crc), None)
        before, self._begun = self._begun, self._begun + 1
        if index is not None:
            call = self._recorded.pop(index)
            return OpenCall(index, prompt, crc, call.chunks, call.num_tokens)
        while before in self._taken:
            before += 1
        self._taken.add(before)
        return OpenCall(before, prompt, crc)
