"""An OpenAI-compatible endpoint for agents that know nothing of us: what they ask, a rollout's policy answers.

One server for all episodes of a host, on its loop: an episode is known by its key. A key that was never given is
answered with 401, one whose episode is over with 410: OpenAI's clients try neither again. A client that hangs up takes
its request back from the engine. A call that waits for the engine is a response that has not begun: the client's own
time-out counts, and a stream is kept alive by comments.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from aiohttp import web

from async_rl.environments.api import Endpoint
from async_rl.errors import UserError
from async_rl.listening import listen
from async_rl.rollout.openai_replies import MODEL, Answer
from async_rl.rollout.openai_requests import IGNORABLE, Question, Refused, read_chat, read_completion
from async_rl.rollout.reply import NoRoom, RecordedReply

MAX_BODY_BYTES = 64 << 20
MAX_WAITING = 256
"""Requests of one episode at a time."""
KEEP_ALIVE_S = 15.0
REMEMBERED_KEYS = 10_000
"""Of episodes that are over."""


class Answers(Protocol):
    """The policy of an episode."""

    @property
    def temperature(self) -> float | None:
        """That is trained at; None: nothing is trained on, any may be asked for."""
        ...

    async def answer(self, question: Question) -> RecordedReply:
        """Raises ValueError or UserError: the question is impossible."""
        ...


class _Episode:
    """What one key opens."""

    def __init__(self, policy: Answers, ignore: frozenset[str]) -> None:
        self.policy, self.ignore = policy, ignore
        self.error: BaseException | None = None
        """A bug of ours, met while it was answered."""
        self._calls: set[asyncio.Task[RecordedReply]] = set()

    async def answer(self, question: Question) -> RecordedReply:
        if len(self._calls) >= MAX_WAITING:
            raise Refused(
                f"{MAX_WAITING} requests of this episode are waiting: wait for some of them",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
            )
        call = asyncio.ensure_future(self.policy.answer(question))
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the client hung up
            raise _over() from None
        except (ValueError, UserError) as error:
            code = "context_length_exceeded" if isinstance(error, NoRoom) else None
            raise Refused(str(error), code=code) from error
        except Exception as error:
            self.error = error
            raise
        finally:
            self._calls.discard(call)

    def end(self) -> None:
        for call in list(self._calls):
            call.cancel()


class OpenAIServer:
    """`start` whenever it is needed, `open` for every episode that wants it, `stop`.

    Args:
        host: where it listens; agents must reach it there.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._episodes: dict[str, _Episode] = {}
        self._over: deque[str] = deque(maxlen=REMEMBERED_KEYS)
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._base_url = ""

    async def start(self) -> None:
        """Raises UserError: this machine has no such address."""
        async with self._starting:
            if self._runner is None:
                self._runner = await self._serve()

    async def _serve(self) -> web.AppRunner:
        listening = listen(self._host, field="environment.endpoint_host", owner="generator")
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model}", self._model),
                web.route("*", "/{path:.*}", self._nowhere),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._base_url = f"http://{host}:{listening.getsockname()[1]}/v1"
        return runner

    async def stop(self) -> None:
        for episode in self._episodes.values():
            episode.end()
        if self._runner is not None:
            await self._runner.cleanup()

    @contextmanager
    def open(self, policy: Answers, ignore: Sequence[str]) -> Generator[Endpoint]:
        """Raises ValueError: `ignore` names what cannot be ignored; whatever of ours broke while it was open."""
        for name in ignore:
            if name not in IGNORABLE:
                raise ValueError(f"ignore = {name!r}: write some of {', '.join(sorted(IGNORABLE))}")
        key = f"sk-{secrets.token_urlsafe(24)}"
        episode = self._episodes[key] = _Episode(policy, frozenset(ignore))
        try:
            yield Endpoint(self._base_url, key, MODEL)
        finally:
            episode.end()
            del self._episodes[key]
            self._over.append(key)
        if episode.error is not None:
            raise episode.error

    # --- requests ---------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answered(request, read_chat, Answer.chat, Answer.chat_stream)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._answered(request, read_completion, Answer.completion, Answer.completion_stream)

    async def _models(self, request: web.Request) -> web.Response:
        return self._guarded(request, lambda: {"object": "list", "data": [_MODEL]})

    async def _model(self, request: web.Request) -> web.Response:
        return self._guarded(request, lambda: _MODEL)

    async def _nowhere(self, request: web.Request) -> web.Response:
        served = "/v1/chat/completions, /v1/completions and /v1/models"
        return _refusal(Refused(f"{request.method} {request.path}: here are {served}", status=404))

    async def _answered(
        self,
        request: web.Request,
        read: Callable[[object, float | None, frozenset[str]], Question],
        whole: Callable[[Answer], dict[str, Any]],
        pieces: Callable[[Answer], Iterator[dict[str, Any]]],
    ) -> web.StreamResponse:
        try:
            episode = self._episode(request)
            question = read(await _json(request), episode.policy.temperature, episode.ignore)
            if question.stream:
                return await _stream(request, question, episode.answer(question), pieces)
            return web.json_response(whole(Answer(question, await episode.answer(question), int(time.time()))))
        except Refused as refused:
            return _refusal(refused)

    def _guarded(self, request: web.Request, body: Callable[[], dict[str, Any]]) -> web.Response:
        try:
            self._episode(request)
        except Refused as refused:
            return _refusal(refused)
        return web.json_response(body())

    def _episode(self, request: web.Request) -> _Episode:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        episode = self._episodes.get(key) if scheme.lower() == "bearer" else None
        if episode is not None:
            return episode
        if key in self._over:
            raise _over()
        raise Refused("this key opens no episode", status=401, code="invalid_api_key")


async def _json(request: web.Request) -> object:
    try:
        return await request.json()
    except ValueError:
        raise Refused("the body is no JSON") from None


async def _stream(
    request: web.Request,
    question: Question,
    answer: Awaitable[RecordedReply],
    pieces: Callable[[Answer], Iterator[dict[str, Any]]],
) -> web.StreamResponse:
    """Server-sent events. An error that comes after the first byte is an event of its own."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    waiting = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([waiting], timeout=KEEP_ALIVE_S))[0]:
            if not response.prepared:
                await response.prepare(request)
            await response.write(b": waiting for the policy\n\n")
        try:
            events = list(pieces(Answer(question, waiting.result(), int(time.time()))))
        except Refused as refused:
            if not response.prepared:
                raise
            events = [refused.body]
        if not response.prepared:
            await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    except ConnectionResetError:
        pass  # the client hung up
    finally:
        if not waiting.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refused):
                await waiting
    return response


_MODEL = {"id": MODEL, "object": "model", "created": 0, "owned_by": "async_rl"}


def _over() -> Refused:
    return Refused("the episode of this key is over", status=410, code="episode_over")


def _refusal(refused: Refused) -> web.Response:
    return web.json_response(refused.body, status=refused.status)
