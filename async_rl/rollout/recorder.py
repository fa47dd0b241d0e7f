"""Pure: keeps what one episode's policy sampled, token by token, as the sequences that will be trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from async_rl.engines.protocol import Chunk, Float32s, Int32s
from async_rl.wire.messages import FinishReason, VersionSpan
from async_rl.wire.messages import Sequence as WireSequence


class _Open:
    """One sequence that may still be extended."""

    __slots__ = ("length", "sampled", "spans", "tokens")

    def __init__(self) -> None:
        self.tokens: list[Int32s] = []
        self.length = 0
        self.sampled: list[tuple[int, Float32s]] = []
        """Where sampled tokens start, and their log-probs."""
        self.spans: list[VersionSpan] = []

    def extend(self, tokens: Int32s) -> None:
        self.tokens.append(tokens)
        self.length += len(tokens)

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
    """`call` before the policy is asked, `sampled` with what it said, `sequences` at the end.

    A call whose prompt extends the tokens so far (a further turn of the same conversation) continues the last
    sequence: what lies between is not trainable. Any other prompt begins a new sequence.
    """

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self.num_sampled = 0
        """Tokens sampled in this episode so far: the counter of the next one."""
        self.finish_reason: FinishReason = "eos"
        """Of the last call."""

    def call(self, prompt: Sequence[int]) -> None:
        tokens = np.asarray(prompt, np.int32)
        if self._open:
            last = self._open[-1]
            if len(tokens) >= last.length and np.array_equal(tokens[: last.length], last.flat()):
                if len(tokens) > last.length:
                    last.extend(tokens[last.length :])
                return
        fresh = _Open()
        fresh.extend(tokens)
        self._open.append(fresh)

    def sampled(self, chunk: Chunk) -> None:
        last, start = self._open[-1], self._open[-1].length
        last.sampled.append((start, chunk.logprobs))
        for span in chunk.spans:
            shifted = VersionSpan(start + span.start, start + span.end, span.version, span.kv_version)
            previous = last.spans[-1] if last.spans else None
            if previous is not None and (previous.end, previous.version, previous.kv_version) == (
                shifted.start,
                shifted.version,
                shifted.kv_version,
            ):
                last.spans[-1] = VersionSpan(previous.start, shifted.end, shifted.version, shifted.kv_version)
            else:
                last.spans.append(shifted)
        last.extend(chunk.tokens)
        self.num_sampled += len(chunk.tokens)
        if chunk.finish_reason is not None:
            self.finish_reason = chunk.finish_reason

    def sequences(self) -> list[WireSequence]:
        """Sequences in which the policy sampled something."""
        return [sequence.close() for sequence in self._open if sequence.spans]
