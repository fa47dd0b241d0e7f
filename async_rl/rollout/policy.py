"""The policy of one episode: it asks the engine, records what was sampled, and goes on where an earlier lease stopped.

    one call:  recorded whole?  --> return it
               recorded in part --> ask for the rest --> a segment every so many tokens --> record, return it
                                                     \\-> the lease's budget is used up, or it is wanted back: yield

An episode is resumed by running its code again: recorded calls cost no time, and the random numbers of a token depend
on its call and its position there, so that whatever follows is what would have followed. Calls may overlap.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

from async_rl.engines.protocol import Chunk, Request, Swap
from async_rl.engines.sampling import call_key, rollout_key
from async_rl.engines.validation import check_length
from async_rl.environments.api import Endpoint, Message, Tool
from async_rl.rollout.conversations import Conversations, Prompt
from async_rl.rollout.desk import Desk, LiveRequest, Requests
from async_rl.rollout.openai_requests import Question
from async_rl.rollout.recorder import Recorder
from async_rl.rollout.reply import NoRoom, RecordedReply
from async_rl.rollout.segments import CallNumbers, OpenCall, empty_chunk, first_tokens, join, recorded_calls
from async_rl.rollout.stop_text import LOOK_EVERY_TOKENS, tokens_to_stop
from async_rl.wire.messages import FinishReason, GroupLease, Segment


@dataclass(frozen=True, slots=True)
class _Asked:
    prompt: Prompt
    max_new_tokens: int | None
    stop: tuple[str, ...]
    tools: bool
    fit: bool


class RecordedPolicy:
    """Evaluation is neither persisted nor cut short."""

    def __init__(self, desk: Desk, lease: GroupLease, member: int) -> None:
        self.lease, self.member = lease, member
        self.recorder = Recorder()
        train = lease.purpose == "train"
        self._desk = desk
        self._conversations = Conversations(desk.text)
        self._key = rollout_key(lease.sampling.seed, lease.group_id << 16 | member)
        self._segment_tokens = lease.segment_tokens if train else 0
        self._lease_tokens = lease.lease_tokens if train else 0
        recorded = recorded_calls(lease, member)
        self._numbers = CallNumbers(recorded)
        self._requests = Requests(sum(call.num_tokens for call in recorded.values()))
        self._sampled = 0
        """Tokens under this lease."""
        self._wanted_back = False
        self._parked = False
        """A call has yielded, and waits for those that are still with the engine."""
        self._over: list[OpenCall] = []
        """Calls that ended and are not durable to their end."""
        self._held_back: list[Segment] = []
        """Their segments, where nothing is made durable before the rollout yields."""
        self._progress_at = desk.time()

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        fit: bool = False,
    ) -> RecordedReply:
        """`fit`: fewer tokens, where the engine holds no more, instead of a ValueError."""
        prompt = self._conversations.prompt(messages, tools)
        reply = await self._call(_Asked(prompt, max_new_tokens, tuple(stop), bool(tools), fit))
        self._conversations.said(prompt, reply.tokens)
        return reply

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        fit: bool = False,
    ) -> RecordedReply:
        tokens = self._desk.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        return await self._call(_Asked(Prompt(tokens), max_new_tokens, tuple(stop), False, fit))

    @asynccontextmanager
    async def endpoint(self, *, ignore: Sequence[str] = ()) -> AsyncGenerator[Endpoint]:
        server = await self._desk.endpoint()
        with server.open(self, ignore) as opened:
            yield opened

    # --- for the endpoint -------------------------------------------------------------------------------------

    @property
    def temperature(self) -> float | None:
        return self.lease.sampling.temperature if self.lease.purpose == "train" else None

    async def answer(self, question: Question) -> RecordedReply:
        limit, stop = question.max_new_tokens, question.stop
        if question.messages:
            return await self.chat(question.messages, tools=question.tools, max_new_tokens=limit, stop=stop, fit=True)
        return await self.complete(question.prompt, max_new_tokens=limit, stop=stop, fit=True)

    # --- for the host -----------------------------------------------------------------------------------------

    def hand_back(self) -> bool:
        """Yield instead of asking for more; requests that are recalled then yield with what they have. False:
        evaluation, which stays."""
        self._wanted_back = self.lease.purpose == "train"
        return self._wanted_back

    @property
    def request_ids(self) -> list[int]:
        """Of the requests that are with the engine now."""
        return list(self._requests.live)

    @property
    def stage(self) -> str:
        return "in the engine" if self._requests.live else "in the environment"

    def last_progress(self) -> float:
        """While a request is with the engine, in a slot or waiting for one, the engine's progress is the episode's."""
        return max(self._progress_at, self._desk.stepped_at()) if self._requests.live else self._progress_at

    def receive(self, chunk: Chunk, delivered: int) -> None:
        self._progress_at = self._desk.time()
        live = self._requests.receive(chunk, delivered)
        if chunk.finish_reason is not None:
            return
        if live.stop and tokens_to_stop(self._desk.text, live.tokens, live.stop) is not None:
            self._desk.recall([chunk.request_id])
        elif not live.stop or 0 < self._segment_tokens <= sum(len(one.tokens) for one in live.pending):
            self._persist(live.call, join(live.pending), None)
            live.pending.clear()

    def sampled_at(self, swap: Swap) -> int:
        """How many tokens the episode had when these weights went live, over all calls and leases."""
        return self._requests.sampled_at(swap)

    # --- one call ---------------------------------------------------------------------------------------------

    async def _call(self, asked: _Asked) -> RecordedReply:
        if not self._desk.runs(self):
            raise asyncio.CancelledError
        self._progress_at = self._desk.time()
        try:
            return await self._answer(asked)
        finally:
            self._progress_at = self._desk.time()

    async def _answer(self, asked: _Asked) -> RecordedReply:
        limit, prompt = self._limit(asked), asked.prompt
        self._settle()
        call = self._numbers.begin(prompt.tokens)
        chunks = call.recorded
        if not chunks or chunks[-1].finish_reason is None:
            chunks = [*chunks, *await self._sample(call, limit, asked.stop)]
        self.recorder.call(prompt.tokens, chunks)
        whole = join(chunks)
        assert whole.finish_reason is not None
        return RecordedReply(
            self._desk.text,
            whole.tokens.tolist(),
            whole.logprobs.tolist(),
            whole.finish_reason,
            call.index,
            len(prompt.tokens),
            prompt.opens_thoughts,
            asked.tools,
            asked.stop,
        )

    def _limit(self, asked: _Asked) -> int:
        """How many tokens the reply may have."""
        most = self.lease.sampling.max_new_tokens
        limit = min(most, asked.max_new_tokens or most)
        if not asked.fit or not self._desk.max_length:
            return limit
        room = self._desk.max_length - len(asked.prompt.tokens)
        if room < 1:
            raise NoRoom(
                f"the prompt has {len(asked.prompt.tokens)} tokens: a sequence holds at most "
                f"{self._desk.max_length}, the reply included"
            )
        return min(limit, room)

    def _settle(self) -> None:
        """Calls that ended before another one are over for good, so they become durable to their end. The last one's
        end is the episode's."""
        over, self._over = self._over, []
        for call in over:
            assert call.last is not None
            segment = call.segment(self.lease, self.member, call.last, call.last.finish_reason)
            if self._segment_tokens or self._lease_tokens:
                self._desk.persist(segment)
            else:
                self._held_back.append(segment)

    async def _sample(self, call: OpenCall, limit: int, stop: tuple[str, ...]) -> list[Chunk]:
        """The rest of a call of at most `limit` tokens. Does not return when the lease's budget ends before it."""
        if call.durable >= limit:  # the limit was lowered since
            return [empty_chunk("length")]
        request, cut = self._request(call, limit), False
        if stop:
            pieces = min(LOOK_EVERY_TOKENS, self._segment_tokens or LOOK_EVERY_TOKENS)
            request = dataclasses.replace(request, segment_tokens=pieces)
        if self._wanted_back:
            await self._yield(call, empty_chunk())
        if self._lease_tokens:
            check_length(request, self._desk.max_length)  # what no lease could finish is refused by the first
            budget = self._lease_tokens - self._sampled
            if budget <= 0:
                await self._yield(call, empty_chunk())
            if budget < request.max_new_tokens:
                request, cut = dataclasses.replace(request, max_new_tokens=budget), True
        live = await self._ask(request, LiveRequest(call, stop))
        last = join(live.pending)
        reason = last.finish_reason
        if stop and (count := tokens_to_stop(self._desk.text, live.tokens, stop)) is not None:
            last, reason = first_tokens(last, count - call.durable, "stop"), "stop"
        self._sampled += call.durable - request.position + len(last.tokens)
        if (cut and reason == "length") or (self._wanted_back and reason == "aborted"):
            await self._yield(call, last)
        if self._parked and not self._requests.live:
            await self._yield(call, last, reason)
        if self.lease.purpose == "train":
            call.last = last
            self._over.append(call)
        return [*live.chunks[: len(live.chunks) - len(live.pending)], last]

    def _request(self, call: OpenCall, limit: int) -> Request:
        return Request(
            id=self._desk.next_request_id(),
            prompt=call.prompt + tuple(token for chunk in call.recorded for token in chunk.tokens.tolist()),
            max_new_tokens=limit - call.durable,
            key=call_key(self._key, call.index),
            temperature=self.lease.sampling.temperature,
            position=call.durable,
            stop=self._desk.text.stop_tokens,
            segment_tokens=self._segment_tokens or None,
        )

    async def _ask(self, request: Request, live: LiveRequest) -> LiveRequest:
        """Until its last chunk. If the environment stops to wait for it, the engine lets go of it."""
        self._requests.live[request.id] = live
        try:
            await self._desk.ask(request, self)
        finally:
            self._desk.withdraw(request.id)
            del self._requests.live[request.id]
        return live

    def _persist(self, call: OpenCall, chunk: Chunk, reason: FinishReason | None, *, yielded: bool = False) -> None:
        self._desk.persist(call.segment(self.lease, self.member, chunk, reason, yielded=yielded))

    async def _yield(self, call: OpenCall, chunk: Chunk, reason: FinishReason | None = None) -> NoReturn:
        """The lease of this member ends with these tokens, and so does the episode here: at once, or when the other
        calls that are with the engine are back."""
        if self._desk.runs(self):
            self._wanted_back = self._parked = True
            self._settle()
            for segment in self._held_back:
                self._desk.persist(segment)
            self._held_back = []
            others = list(self._requests.live)
            self._persist(call, chunk, reason, yielded=not others)
            if others:
                self._desk.recall(others)
                await asyncio.get_running_loop().create_future()  # until the last of them leaves, and this is cancelled
            self._desk.leave(self)
        raise asyncio.CancelledError
