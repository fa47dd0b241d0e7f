"""Pure: keeps what one episode's policy sampled, token by token, as the sequences that will be trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from async_rl.engines.protocol import Chunk, Float32s, Int32s
from async_rl.rollout.segments import shifted
from async_rl.wire.messages import FinishReason, VersionSpan
from async_rl.wire.messages import Sequence as WireSequence


class _Open:
    """One sequence that may still be extended."""

    __slots__ = ("length", "sampled", "spans", "tokens")

    def __init__(self, prompt: Int32s) -> None:
        self.tokens: list[Int32s] = [prompt]
        self.length = len(prompt)
        self.sampled: list[tuple[int, Float32s]] = []
        """Where sampled tokens start, and their log-probs."""
        self.spans: list[VersionSpan] = []

    def begins(self, tokens: Int32s) -> bool:
        return len(tokens) >= self.length and np.array_equal(tokens[: self.length], self.flat())

    def extend(self, tokens: Int32s) -> None:
        if len(tokens):
            self.tokens.append(tokens)
            self.length += len(tokens)

    def add(self, chunk: Chunk) -> None:
        start = self.length
        self.sampled.append((start, chunk.logprobs))
        for span in chunk.spans:
            fresh = shifted(span, start)
            previous = self.spans[-1] if self.spans else None
            if previous is not None and (previous.end, previous.version, previous.kv_version) == (
                fresh.start,
                fresh.version,
                fresh.kv_version,
            ):
                self.spans[-1] = VersionSpan(previous.start, fresh.end, fresh.version, fresh.kv_version)
            else:
                self.spans.append(fresh)
        self.extend(chunk.tokens)

    def flat(self) -> Int32s:
        if len(self.tokens) > 1:
            self.tokens = [np.concatenate(self.tokens)]
        return self.tokens[0]

    def close(self) -> WireSequence:
        logprobs = np.zeros(self.length, np.float32)
        for start, sampled in self.sampled:
            logprobs[start : start + len(sampled)] = sampled
        return WireSequence(self.flat().tobytes(), logprobs.tobytes(), self.spans)


class Recorder:
    """`call` with every call of the policy that was answered, `sequences` at the end.

    A call whose prompt extends the tokens of a sequence (a further turn of the same conversation) continues it: what
    lies between is not trainable. Any other prompt begins a new sequence. Calls that overlap are recorded in the order
    in which they were answered: of two that go on from the same turn, the first continues its sequence.
    """

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self.finish_reason: FinishReason = "eos"
        """Of the call that was answered last."""

    def call(self, prompt: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """The last chunk has a finish reason."""
        tokens = np.asarray(prompt, np.int32)
        begun = [one for one in self._open if one.begins(tokens)]
        if begun:
            sequence = max(begun, key=lambda one: one.length)
            sequence.extend(tokens[sequence.length :])
        else:
            sequence = _Open(tokens)
            self._open.append(sequence)
        for chunk in chunks:
            sequence.add(chunk)
            self.finish_reason = chunk.finish_reason or self.finish_reason

    def sequences(self) -> list[WireSequence]:
        """Sequences in which the policy sampled something."""
        return [sequence.close() for sequence in self._open if sequence.spans]
