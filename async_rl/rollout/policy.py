"""The policy of one episode: it asks the engine, records what was sampled, and goes on where an earlier lease stopped.

    one call:  recorded whole?  --> return it
               recorded in part --> ask for the rest --> a segment every so many tokens --> record, return it
                                                     \\-> the lease's budget is used up, or it is wanted back: yield

An episode is resumed by running its code again: recorded calls cost no time, and the random numbers of a token depend
on its position alone, so that whatever follows is what would have followed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from async_rl.engines.protocol import Chunk, Request, Swap
from async_rl.engines.sampling import rollout_key
from async_rl.engines.validation import check_length
from async_rl.environments.api import Message
from async_rl.rollout.recorder import Recorder
from async_rl.rollout.segments import OpenCall, empty_chunk, prompt_crc, recorded_calls
from async_rl.wire.messages import FinishReason, GroupLease, Segment


class Text(Protocol):
    """The tokenizer, as far as rollouts need it (models.text for real models)."""

    stop_tokens: frozenset[int]

    def encode(self, text: str) -> tuple[int, ...]: ...

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class RecordedReply:
    """What a call returned; the text is decoded when it is read."""

    decoder: Text
    tokens: list[int]
    finish_reason: FinishReason

    @property
    def text(self) -> str:
        return self.decoder.decode(self.tokens)


class Desk(Protocol):
    """What a policy needs of the host it runs in. Everything happens on the host's loop."""

    text: Text

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion the engine can hold; 0 = no bound."""
        ...

    def time(self) -> float: ...

    def stepped_at(self) -> float:
        """When the engine sampled last."""
        ...

    def next_request_id(self) -> int: ...

    def ask(self, request: Request, policy: RecordedPolicy) -> asyncio.Future[None]:
        """The policy's `receive` gets the chunks; the future is done after the last one."""
        ...

    def withdraw(self, request_id: int) -> None:
        """Let go of a request, if it is still with the engine."""
        ...

    def persist(self, segment: Segment) -> None: ...

    def runs(self, policy: RecordedPolicy) -> bool:
        """False once its rollout was cancelled, failed or yielded, whatever its code still does."""
        ...

    def leave(self, policy: RecordedPolicy) -> None:
        """Forget this rollout without a report; its task is cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """For Positions: what a request added to the episode."""

    id: int
    first: int
    """Tokens of the episode before it."""
    last: int
    """Tokens of the episode after it."""
    delivered: int
    """Chunks the engine had delivered, its last one included."""


class RecordedPolicy:
    """Asked once at a time. Evaluation is neither persisted nor cut short."""

    def __init__(self, desk: Desk, lease: GroupLease, member: int) -> None:
        self.lease, self.member = lease, member
        self.recorder = Recorder()
        train = lease.purpose == "train"
        self._desk = desk
        self._key = rollout_key(lease.sampling.seed, lease.group_id << 16 | member)
        self._segment_tokens = lease.segment_tokens if train else 0
        self._lease_tokens = lease.lease_tokens if train else 0
        self._recorded = recorded_calls(lease, member)
        """By the number of the call; nothing once the environment asked something else."""
        self._resumed = sum(call.num_tokens for call in self._recorded.values())
        """Tokens of the episode that earlier leases sampled."""
        self._sampled = 0
        """Tokens under this lease."""
        self._wanted_back = False
        self._held_back: list[Segment] = []
        """Calls that ended, where nothing is made durable before the rollout yields."""
        self._calls = 0
        self._last_call: OpenCall | None = None
        self._request: Request | None = None
        """With the engine now."""
        self._chunks: list[Chunk] = []
        self._ended: list[EndedRequest] = []
        self._asked = False
        self._progress_at = desk.time()

    async def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None) -> RecordedReply:
        return await self._call(self._desk.text.encode_chat(messages), max_new_tokens)

    async def complete(self, prompt: str | Sequence[int], *, max_new_tokens: int | None = None) -> RecordedReply:
        tokens = self._desk.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        return await self._call(tokens, max_new_tokens)

    # --- for the host -----------------------------------------------------------------------------------------

    def hand_back(self) -> bool:
        """Yield instead of asking for more; a request that is aborted then yields with what it has. False: evaluation,
        which stays."""
        self._wanted_back = self.lease.purpose == "train"
        return self._wanted_back

    @property
    def request_id(self) -> int | None:
        """Of the request that is with the engine now."""
        return self._request.id if self._request is not None else None

    @property
    def stage(self) -> str:
        return "in the environment" if self._request is None else "in the engine"

    def last_progress(self) -> float:
        """While a request is with the engine, in a slot or waiting for one, the engine's progress is the episode's."""
        return self._progress_at if self._request is None else max(self._progress_at, self._desk.stepped_at())

    def receive(self, chunk: Chunk, delivered: int) -> None:
        """The next tokens of the request; `delivered` counts all chunks of the engine, this one included."""
        assert self._request is not None and self._last_call is not None
        self._progress_at = self._desk.time()
        self._chunks.append(chunk)
        if chunk.finish_reason is None:
            self._desk.persist(self._last_call.segment(self.lease, self.member, chunk, None))
        else:
            first = self._request.position
            last = first + sum(len(one.tokens) for one in self._chunks)
            self._ended.append(EndedRequest(self._request.id, first, last, delivered))

    def sampled_at(self, swap: Swap) -> int:
        """How many tokens the episode had when these weights went live, over all calls and leases."""
        if self._request is not None and self._request.id in swap.sampled:
            return self._request.position + swap.sampled[self._request.id]
        for ended in reversed(self._ended):
            if ended.id in swap.sampled:
                return ended.first + swap.sampled[ended.id]
            if ended.delivered <= swap.delivered:
                return ended.last
        return self._resumed

    # --- one call ---------------------------------------------------------------------------------------------

    async def _call(self, prompt: tuple[int, ...], max_new_tokens: int | None) -> RecordedReply:
        if not self._desk.runs(self):
            raise asyncio.CancelledError
        if self._asked:
            raise RuntimeError("the policy is asked once at a time: await its reply before asking again")
        self._asked = True
        self._progress_at = self._desk.time()
        try:
            return await self._answer(prompt, max_new_tokens)
        finally:
            self._asked = False
            self._progress_at = self._desk.time()

    async def _answer(self, prompt: tuple[int, ...], max_new_tokens: int | None) -> RecordedReply:
        most = self.lease.sampling.max_new_tokens
        call = self._begin(prompt)
        chunks = self._replay(call)
        if not chunks or chunks[-1].finish_reason is None:
            chunks += await self._sample(call, chunks, min(most, max_new_tokens or most))
        tokens = [token for chunk in chunks for token in chunk.tokens.tolist()]
        return RecordedReply(self._desk.text, tokens, self.recorder.finish_reason)

    def _begin(self, prompt: tuple[int, ...]) -> OpenCall:
        """The call before this one is over for good, so it becomes durable to its end."""
        before = self._last_call
        if before is not None and before.last is not None and self.lease.purpose == "train":
            segment = before.segment(self.lease, self.member, before.last, before.last.finish_reason)
            if self._segment_tokens or self._lease_tokens:
                self._desk.persist(segment)
            else:
                self._held_back.append(segment)
        self._last_call = OpenCall(self._calls, prompt)
        self._calls += 1
        self.recorder.call(prompt)
        return self._last_call

    def _replay(self, call: OpenCall) -> list[Chunk]:
        """What earlier leases sampled in this call. If they were asked something else, it and all that follows is
        worth nothing."""
        recorded = self._recorded.get(call.index)
        if recorded is None:
            return []
        call.crc = prompt_crc(call.prompt)
        if recorded.prompt != call.crc:
            self._recorded = {}
            self._resumed = self.recorder.num_sampled
            return []
        call.durable = recorded.num_tokens
        for chunk in recorded.chunks:
            self.recorder.sampled(chunk)
        return list(recorded.chunks)

    async def _sample(self, call: OpenCall, recorded: list[Chunk], limit: int) -> list[Chunk]:
        """The rest of a call of at most `limit` tokens. Does not return when the lease's budget ends before it."""
        if call.durable >= limit:  # the limit was lowered since
            end = empty_chunk("length")
            self.recorder.sampled(end)
            return [end]
        request = Request(
            id=self._desk.next_request_id(),
            prompt=call.prompt + tuple(token for chunk in recorded for token in chunk.tokens.tolist()),
            max_new_tokens=limit - call.durable,
            key=self._key,
            temperature=self.lease.sampling.temperature,
            position=self.recorder.num_sampled,
            stop=self._desk.text.stop_tokens,
            segment_tokens=self._segment_tokens or None,
        )
        cut = False
        if self._wanted_back:
            self._yield(call, empty_chunk())
        if self._lease_tokens:
            check_length(request, self._desk.max_length)  # what no lease could finish is refused by the first
            budget = self._lease_tokens - self._sampled
            if budget <= 0:
                self._yield(call, empty_chunk())
            if budget < request.max_new_tokens:
                request, cut = dataclasses.replace(request, max_new_tokens=budget), True
        chunks = await self._ask(request)
        self._sampled += sum(len(chunk.tokens) for chunk in chunks)
        call.last = chunks[-1]
        reason = call.last.finish_reason
        if (cut and reason == "length") or (self._wanted_back and reason == "aborted"):
            self._yield(call, call.last)
        for chunk in chunks:
            self.recorder.sampled(chunk)
        return chunks

    async def _ask(self, request: Request) -> list[Chunk]:
        """All chunks of a request. If the environment stops to wait for it, the engine lets go of it."""
        self._request, self._chunks = request, []
        try:
            await self._desk.ask(request, self)
        finally:
            self._desk.withdraw(request.id)
            self._request = None
        return self._chunks

    def _yield(self, call: OpenCall, chunk: Chunk) -> NoReturn:
        """The lease of this member ends with these tokens, and so does the episode here."""
        if self._desk.runs(self):
            for segment in self._held_back:
                self._desk.persist(segment)
            self._desk.persist(call.segment(self.lease, self.member, chunk, None, yielded=True))
            self._desk.leave(self)
        raise asyncio.CancelledError
