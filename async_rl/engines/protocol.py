"""Pure: the seam between rollouts and whatever turns prompts into tokens. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from async_rl.wire.messages import FinishReason, VersionSpan, WeightsId

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample."""

    id: int
    """Unique among the requests alive in the engine."""
    prompt: tuple[int, ...]
    """Token ids, at least one, each within the vocabulary. Requests with an equal prompt may share one prefill."""
    max_new_tokens: int
    key: int
    """64-bit key of the call (engines.sampling.call_key): token t is drawn with uniform(key, position + t)."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it, and log-probs are of that distribution."""
    position: int = 0
    """Counter of the first sampled token: how many tokens of this call were sampled before, under earlier leases."""
    stop: frozenset[int] = frozenset()
    """Token ids that end the completion and stay in it (finish reason `eos`)."""
    segment_tokens: int | None = None
    """Deliver an unfinished chunk every so many tokens; None delivers once, at the end."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a request; the last one has a finish reason."""

    request_id: int
    tokens: Int32s
    """[n] int32"""
    logprobs: Float32s
    """[n] float32, natural log, of the distribution really sampled"""
    spans: list[VersionSpan]
    """Cover [0, n); positions count from the first token of this chunk."""
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One set of weights under Hugging Face parameter names, whole."""

    weights: WeightsId
    tensors: Mapping[str, Any]
    """name -> torch tensor; empty for an engine without weights (fake)."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What an engine knew at the moment at which weights went live, or left the device, between two decode steps."""

    stall_s: float
    """How long no decode step could run."""
    sampled: Mapping[int, int] = field(default_factory=dict[int, int])
    """request id -> tokens sampled of this request, by weights before these; requests that wait for a slot may be
    absent."""
    delivered: int = 0
    """Chunks the engine had produced since its start. It delivers them in this order, so whoever counts them can tell
    what ended before the swap from what ended after it."""
    nbytes: int = 0
    """Of its device, held by the engine's process afterwards: memory reserved on a GPU, the resident set on a CPU."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; the conformance suite says so where something is missing."""

    keeps_partial_tokens: bool = True
    swaps_in_flight: bool = True
    seeded: bool = True
    """The counter hash decides every token: repeating a request repeats its tokens."""
    leaves_device: bool = False
    """`release` works."""
    recomputes: bool = False
    """After a swap, sequences in flight go on over keys and values of the new weights."""
    max_concurrent: int = 1
    max_length: int = 0
    """Prompt plus completion, tokens; 0 = no bound."""


Deliver = Callable[[Sequence[Chunk]], None]


class Engine(Protocol):
    """Samples completions continuously while weights change under it.

    `submit`, `cancel`, `pause` and `resume` return at once and may be called from any thread; chunks come through
    the callback given to `start`, in batches, from a thread of the engine's choosing.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def weights(self) -> WeightsId | None:
        """The weights that sample now; None before the first load."""
        ...

    @property
    def stepped_at(self) -> float:
        """When the last decode step ended, in seconds of time.monotonic() (of the loop, in virtual time); -inf before
        the first. An engine that samples moves it on, whether it delivers anything or not. Now, while the engine is off
        its device: no request is late for that."""
        ...

    def start(self, deliver: Deliver) -> None: ...

    def submit(self, requests: Sequence[Request]) -> None:
        """All of them enter together. A request the engine cannot serve (length, vocabulary) raises ValueError here."""
        ...

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Each ends with a chunk of its partial tokens and finish reason `aborted`; unknown ids are ignored."""
        ...

    def pause(self, lease_s: float | None = None) -> None:
        """Stop between two decode steps; requests keep their state. After so many seconds the engine resumes by itself;
        None: not before `resume`, or at a bound of the engine's own."""
        ...

    def resume(self) -> None: ...

    async def load_weights(self, snapshot: Snapshot) -> Swap:
        """Make the snapshot live between two decode steps, with sequences in flight. After a `release` the engine is
        back on its device, and the KV cache of sequences in flight is computed anew under these weights."""
        ...

    async def release(self) -> Swap:
        """Leave the device between two decode steps: weights and KV cache are freed when it returns, requests keep what
        they sampled, and nothing is sampled until the next `load_weights`. `weights` stays the last id."""
        ...

    def activity(self) -> dict[str, float]:
        """Exclusive wall seconds by cause since start: `engine_step`, `swap`, `paused`, `idle`, `released`."""
        ...

    def gauges(self) -> dict[str, float]:
        """Numbers of its state now, by name, for metrics; there may be none."""
        ...

    async def stop(self) -> None: ...

    async def wait_stopped(self) -> None:
        """Returns after `stop`; raises what broke the engine as soon as it breaks."""
        ...
