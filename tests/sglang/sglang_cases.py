"""Engines over the tests' servers, and requests that keep them busy."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import VOCABULARY, assert_covers, configs, make_model, recompute, request

from async_rl.engines.protocol import Chunk, Request, Snapshot
from async_rl.engines.sglang.client import SGLangClient
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.settings import Settings
from async_rl.models.parameters import Layout
from async_rl.wire.messages import VersionSpan, WeightsId

CONTEXT = 256


def make_engine(
    scratch: Path,
    *,
    attach: Sequence[str] = (),
    slots: int = 8,
    vocabulary: int = VOCABULARY,
    max_length: int = 0,
    **settings: Any,
) -> SGLangEngine:
    """For the `llama` of engine_cases. It hears of every token, so that what a swap says of positions is exact."""
    settings = {"stream_tokens": 1, "scratch": scratch / "weights", "log": scratch / "log"} | settings
    return SGLangEngine(
        Settings(attach=attach, **settings),
        slots=slots,
        vocabulary=vocabulary,
        context=CONTEXT,
        max_length=max_length,
        shapes={entry.name: entry.shape for entry in Layout.of(configs()["llama"]).entries},
    )


class Feed:
    """Keeps requests in flight, and everything that came of them."""

    def __init__(self, engine: SGLangEngine, **options: Any) -> None:
        self.engine, self._options = engine, options
        self.requests: dict[int, Request] = {}
        self.chunks: dict[int, list[Chunk]] = {}
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        engine.start(self._deliver)

    def submit(self, count: int) -> None:
        """Of groups of four with an equal prompt, each of its own length."""
        first = len(self.requests)
        new = [
            request(i, (1, 2, 3 + i // 4 % 40), 60 + 17 * (i % 9), segment_tokens=32, **self._options)
            for i in range(first, first + count)
        ]
        self.requests |= {one.id: one for one in new}
        self.engine.submit(new)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    def ended(self, request_id: int) -> bool:
        return bool(chunks := self.chunks.get(request_id)) and chunks[-1].finish_reason is not None

    @property
    def num_ended(self) -> int:
        return sum(self.ended(request_id) for request_id in self.requests)

    @property
    def num_chunks(self) -> int:
        return sum(map(len, self.chunks.values()))

    async def grow(self, chunks: int = 4) -> None:
        """Wait until so many more have come."""
        target = self.num_chunks + chunks
        await self.until(lambda: self.num_chunks >= target)

    async def finish(self) -> None:
        await self.until(lambda: self.num_ended == len(self.requests))

    def check(self, models: Mapping[int, Any], *, atol: float = 1e-5) -> list[int]:
        """Each request was answered once and whole, and every log-prob is that of the model of its version over
        everything before it. Returns the versions of each chunk that has more than one."""
        assert self.chunks.keys() == self.requests.keys()
        mixed: list[int] = []
        for one in self.requests.values():
            chunks = self.chunks[one.id]
            assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
            tokens = [token for chunk in chunks for token in chunk.tokens.tolist()]
            assert len(tokens) == one.max_new_tokens
            logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
            start = 0
            spans: list[VersionSpan] = []
            for chunk in chunks:
                assert_covers(chunk)
                mixed += [len(chunk.spans)] if len(chunk.spans) > 1 else []
                spans += [VersionSpan(s.start + start, s.end + start, s.version, s.kv_version) for s in chunk.spans]
                start += len(chunk.tokens)
            versions = [span.version for span in spans]
            assert versions == sorted(versions)
            for version in set(versions):
                expected = recompute(models[version], one.prompt, tokens, one.temperature or 1.0).numpy()
                for span in (span for span in spans if span.version == version):
                    assert span.kv_version == version
                    part = slice(span.start, span.end)
                    np.testing.assert_allclose(logprobs[part], expected[part], atol=atol)
        return mixed

    def _deliver(self, chunks: Sequence[Chunk]) -> None:
        self._loop.call_soon_threadsafe(self._receive, chunks)

    def _receive(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            assert not self.ended(chunk.request_id), "answered twice"
            self.chunks.setdefault(chunk.request_id, []).append(chunk)
        self._news.set()


@asynccontextmanager
async def running(engine: SGLangEngine, seconds: float = 120, **options: Any) -> AsyncGenerator[Feed]:
    """A feed of an engine, which is watched, and stopped at the end."""
    async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
        feed = Feed(engine, **options)
        tasks.create_task(engine.wait_stopped())
        try:
            yield feed
        finally:
            await engine.stop()


def snapshot(models: Mapping[int, Any], version: int) -> Snapshot:
    return Snapshot(WeightsId(0, version), {n: p.detach() for n, p in models[version].named_parameters()})


def meddle(directory: Path) -> Callable[[SGLangClient], Awaitable[None]]:
    """Somebody else loads the weights of a directory into a server: `server.run(meddle(directory))`."""

    async def load(client: SGLangClient) -> None:
        await client.pause("retract")
        await client.load_from_disk(str(directory), "somebody-else", 60, flush=True)
        await client.resume()

    return load


def drifting(count: int) -> dict[int, Any]:
    """version -> a model; each a step away from the one before."""
    models = {0: make_model(configs()["llama"], seed=0)}
    with torch.no_grad():
        for version in range(1, count):
            models[version] = copy.deepcopy(models[version - 1])
            generator = torch.Generator().manual_seed(version)
            for parameter in models[version].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return models
