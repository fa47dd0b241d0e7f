"""What every engine owes the generator: the same requests, the same assertions.

An engine joins by adding itself to `ENGINES`; SGLang does so in tests/sglang, where there is a server. What an engine
cannot do is in its capabilities: one that is not seeded is compared with itself in greedy decoding, one that recomputes
has no older KV after a swap, and one without weights is not asked for log-probs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engine_cases import assert_covers, configs, generate, make_model, recompute, request

from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Chunk, Engine, Request, Snapshot, Swap
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.wire.messages import VersionSpan, WeightsId

SLOTS, MAX_LENGTH, VOCABULARY = 3, 250, 53


@dataclass
class Driver:
    """An engine, and what it delivered."""

    engine: Any
    snapshot: Callable[[int], Snapshot]
    """Weights of a version; those of different versions differ."""
    models: dict[int, Any] = field(default_factory=dict)
    """version -> the learner's model with these weights; empty for an engine without."""
    chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    order: list[Chunk] = field(default_factory=list)
    watch: Callable[[Chunk], None] = lambda _: None
    """Called where the engine delivers: what it does happens before the next decode step."""

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

        def deliver(chunks: Sequence[Chunk]) -> None:
            assert chunks
            for chunk in chunks:
                self.chunks.setdefault(chunk.request_id, []).append(chunk)
                self.order.append(chunk)
                self.watch(chunk)
            loop.call_soon_threadsafe(self._news.set)

        self.engine.start(deliver)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def finished(self, *request_ids: int) -> None:
        await self.until(lambda: all(self.is_finished(request_id) for request_id in request_ids))

    def is_finished(self, request_id: int) -> bool:
        chunks = self.chunks.get(request_id, [])
        return bool(chunks) and chunks[-1].finish_reason is not None

    def tokens(self, request_id: int) -> list[int]:
        return [token for chunk in self.chunks[request_id] for token in chunk.tokens.tolist()]

    def reason(self, request_id: int) -> str | None:
        return self.chunks[request_id][-1].finish_reason

    @property
    def again(self) -> float:
        """A temperature at which a request that is repeated gives the same tokens."""
        return 1.0 if self.engine.capabilities.seeded else 0.0

    def kv(self, version: int, entered: int) -> int:
        """The oldest weights in the cache of tokens that `version` sampled for a request of `entered`."""
        return version if self.engine.capabilities.recomputes else entered

    async def complete(self, *requests: Request) -> list[list[int]]:
        self.engine.submit(requests)
        await self.finished(*(one.id for one in requests))
        return [self.tokens(one.id) for one in requests]

    async def pause_at(self, one: Request) -> None:
        """Submit a request that has segments; on its first chunk the engine is paused."""
        paused = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch(chunk: Chunk) -> None:
            if chunk.request_id == one.id and not paused.is_set():
                self.engine.pause()
                loop.call_soon_threadsafe(paused.set)

        self.watch = watch
        self.engine.submit([one])
        await paused.wait()
        self.watch = lambda _: None


def embedded(body: Callable[[Driver], Awaitable[None]]) -> None:
    models = {version: make_model(configs()["llama"], seed=version) for version in range(3)}

    def snapshot(version: int) -> Snapshot:
        return Snapshot(WeightsId(0, version), dict(models[version].named_parameters()))

    async def main() -> None:
        engine = EmbeddedEngine(models[0].config, slots=SLOTS, max_length=MAX_LENGTH)
        async with asyncio.timeout(60):
            await drive(engine, snapshot, body, models)

    asyncio.run(main())


def fake(body: Callable[[Driver], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = FakeEngine(
            slots=SLOTS,
            max_length=MAX_LENGTH,
            vocabulary=VOCABULARY,
            median_tokens=120,
            seconds_per_step=0.01,
            seconds_per_sequence=0.001,
            swap_seconds=0.005,
        )
        await drive(engine, lambda version: Snapshot(WeightsId(0, version), {}), body)

    run_virtual(main())


async def drive(
    engine: Engine,
    snapshot: Callable[[int], Snapshot],
    body: Callable[[Driver], Awaitable[None]],
    models: dict[int, Any] | None = None,
) -> None:
    driver = Driver(engine, snapshot, models or {})
    driver.start()
    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(engine.wait_stopped())
        try:
            await body(driver)
        finally:
            await engine.stop()
    assert watcher.done()


ENGINES = {"embedded": embedded, "fake": fake}


@pytest.fixture(params=list(ENGINES))
def on_engine(request: pytest.FixtureRequest) -> Callable[[Callable[[Driver], Awaitable[None]]], None]:
    return ENGINES[request.param]


def test_requests_wait_for_the_first_weights(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        assert d.engine.weights is None
        d.engine.submit([request(0, (1, 2), 5)])
        swap = await d.engine.load_weights(d.snapshot(0))
        assert d.engine.weights == WeightsId(0, 0)
        assert swap.stall_s >= 0
        assert swap.sampled.get(0, 0) == swap.delivered == 0
        await d.finished(0)
        assert d.chunks[0][0].spans[0].version == 0

    on_engine(body)


def test_each_request_ends_once_with_tokens_logprobs_and_versions(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        stop = frozenset({3, 4})
        requests = [request(i, (1, 2, 3 + i % 4), 1 + 9 * i, stop=stop) for i in range(10)]
        await d.complete(*requests)
        await d.complete(request(99, (1,), 1))
        for one in requests:
            (chunk,) = d.chunks[one.id]
            assert_covers(chunk)
            assert chunk.tokens.dtype == np.int32 and chunk.logprobs.dtype == np.float32
            assert 1 <= len(chunk.tokens) <= one.max_new_tokens
            assert ((chunk.tokens >= 0) & (chunk.tokens < VOCABULARY)).all()
            assert np.isfinite(chunk.logprobs).all() and (chunk.logprobs <= 0).all()
            assert not stop & set(chunk.tokens[:-1].tolist())
            if chunk.finish_reason == "eos":
                assert chunk.tokens[-1] in stop
            else:
                assert (chunk.finish_reason, len(chunk.tokens)) == ("length", one.max_new_tokens)

    on_engine(body)


def test_what_cannot_be_served_is_refused_at_submit(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        for wrong, message in [
            (request(7, ()), r"request 7: prompt = \(\): write at least one token"),
            (request(7, (1, 53)), r"request 7: prompt\[1\] = 53: the vocabulary is 0 to 52"),
            (request(7, (-1,)), r"request 7: prompt\[0\] = -1"),
            (request(7, (1,), 0), r"request 7: max_new_tokens = 0: write 1 or more"),
            (request(7, (1,) * 10, 241), r"max_new_tokens = 241 after a prompt of 10: a sequence holds at most 250"),
            (request(7, (1,), temperature=-1.0), r"request 7: temperature = -1.0: write 0 or more"),
            (request(7, (1,), segment_tokens=0), r"request 7: segment_tokens = 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                d.engine.submit([request(8, (1,)), wrong])
        await d.complete(request(9, (1,), 3))
        assert d.chunks.keys() == {9}  # nothing of a refused submit entered

    on_engine(body)


def test_a_request_repeats_and_resumes(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        stop = frozenset({3})
        crowd = [request(i, (5, i + 1), 40 + i, stop=stop, temperature=d.again) for i in range(8)]
        first = await d.complete(*crowd)
        for i, one in enumerate(crowd):
            d.chunks.clear()
            (again,) = await d.complete(one)
            assert again == first[i]
            cut = len(again) // 2
            left = one.max_new_tokens - cut
            (rest,) = await d.complete(
                request(
                    50,
                    (*one.prompt, *again[:cut]),
                    left,
                    key=one.key,
                    position=cut,
                    stop=one.stop,
                    temperature=d.again,
                )
            )
            assert again[:cut] + rest == first[i]

    on_engine(body)


def test_cancel_returns_partial_tokens(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        (whole,) = await d.complete(request(0, (1, 2), 20, temperature=d.again))
        d.chunks.clear()
        for i in range(1, 6):
            d.engine.submit([request(i, (3,), 200)])  # more than slots
        one = request(0, (1, 2), 200, segment_tokens=3, key=request(0, (1, 2)).key, temperature=d.again)
        d.engine.cancel([1, 2])  # running or not yet: either way they end
        await d.finished(1, 2)
        d.engine.cancel([3, 4, 5])
        await d.finished(3, 4, 5)
        await d.pause_at(one)
        d.engine.submit([request(6, (3,), 20)])
        d.engine.cancel([0, 6, 77])
        await d.finished(0, 6)
        assert d.reason(0) == d.reason(6) == "aborted"
        assert d.tokens(0) == whole[: len(d.tokens(0))]
        assert 3 <= len(d.tokens(0)) <= 4
        assert (d.tokens(6), d.chunks[6][0].spans) == ([], [])
        d.engine.cancel([0, 6])  # over: unknown
        d.engine.resume()
        await d.complete(request(7, (1,), 3))
        assert 77 not in d.chunks
        for chunks in d.chunks.values():
            assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
            for chunk in chunks:
                assert_covers(chunk)

    on_engine(body)


def test_segments_join_to_the_whole(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        (whole,) = await d.complete(request(0, (1, 2), 50, temperature=d.again))
        d.chunks.clear()
        (pieces,) = await d.complete(request(0, (1, 2), 50, segment_tokens=8, temperature=d.again))
        assert pieces == whole
        *unfinished, last = d.chunks[0]
        assert [len(chunk.tokens) for chunk in unfinished] == [8] * len(unfinished)
        assert 1 <= len(last.tokens) <= 8

    on_engine(body)


def test_weights_change_in_mid_sequence(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        if not d.engine.capabilities.swaps_in_flight:
            pytest.skip("no swaps in flight")
        await d.engine.load_weights(d.snapshot(0))
        (old,) = await d.complete(request(0, (1, 2), 40, temperature=d.again))
        d.chunks.clear()
        await d.pause_at(request(0, (1, 2), 40, segment_tokens=10, temperature=d.again))
        await d.engine.load_weights(d.snapshot(1))
        assert d.engine.weights == WeightsId(0, 1)
        d.engine.resume()
        await d.finished(0)
        first, second = d.chunks[0][:2]
        assert first.spans == [VersionSpan(0, 10, 0, 0)]
        boundary = second.spans[0].end if second.spans[0].version == 0 else 0
        assert boundary <= 1  # the engine may have been in a step when it was paused
        assert second.spans[-1] == VersionSpan(boundary, 10, 1, d.kv(1, 0))
        assert d.tokens(0)[: 10 + boundary] == old[: 10 + boundary]
        await d.complete(request(1, (1, 2), 5))
        assert d.chunks[1][0].spans == [VersionSpan(0, 5, 1, 1)]

    on_engine(body)


def test_a_swap_says_how_far_every_request_was(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        if not d.engine.capabilities.swaps_in_flight:
            pytest.skip("no swaps in flight")
        await d.engine.load_weights(d.snapshot(0))
        requests = [request(i, (1, 2 + i), 20 + 9 * i, segment_tokens=(3, 7, None)[i % 3]) for i in range(6)]
        d.engine.submit(requests)
        swaps: list[Swap] = []

        def over() -> bool:
            return all(d.is_finished(one.id) for one in requests)

        while not over():
            version, chunks = len(swaps) + 1, len(d.order)
            tensors = d.snapshot(version % 3).tensors
            swaps.append(await d.engine.load_weights(Snapshot(WeightsId(0, version), tensors)))
            await d.until(lambda chunks=chunks: len(d.order) > chunks or over())
        for version, swap in enumerate(swaps, 1):
            ended = {chunk.request_id for chunk in d.order[: swap.delivered] if chunk.finish_reason is not None}
            for one in requests:
                spans = [span for chunk in d.chunks[one.id] for span in chunk.spans]
                older = sum(span.end - span.start for span in spans if span.version < version)
                assert (one.id in ended) == (older == len(d.tokens(one.id)))
                if one.id not in ended:
                    assert swap.sampled.get(one.id, 0) == older
                else:
                    assert one.id not in swap.sampled

    on_engine(body)


def test_logprobs_are_those_of_the_learner(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        requests = [request(i, (1, 2 + i % 3), 30, temperature=(1.0, 0.6, 1.7)[i % 3]) for i in range(6)]
        greedy = request(6, (4,), 30, temperature=0.0)
        requests += [greedy, request(7, (4,), 40, segment_tokens=7)]
        await d.complete(*requests)
        await d.engine.load_weights(d.snapshot(1))
        await d.complete(request(8, (1, 2), 30))
        for one in [*requests, request(8, (1, 2), 30)]:
            chunks = d.chunks[one.id]
            version = 1 if one.id == 8 else 0
            assert {(span.version, span.kv_version) for chunk in chunks for span in chunk.spans} == {(version, version)}
            if not d.models:
                continue
            expected = recompute(d.models[version], one.prompt, d.tokens(one.id), one.temperature or 1.0)
            logprobs = np.concatenate([chunk.logprobs for chunk in chunks])
            np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-5)
        if d.models:
            assert d.tokens(6) == generate(d.models[0], greedy.prompt, 30)

    on_engine(body)


def test_what_has_no_slot_waits(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        most, begun = 0, set[int]()

        def watch(chunk: Chunk) -> None:
            nonlocal most
            begun.add(chunk.request_id)
            most = max(most, len(begun))
            if chunk.finish_reason is not None:
                begun.discard(chunk.request_id)

        d.watch = watch
        await d.complete(*(request(i, (1, 2 + i), 20 + i, segment_tokens=3) for i in range(12)))
        assert most == SLOTS

    on_engine(body)


def test_a_pause_ends_with_its_lease(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        d.engine.pause(lease_s=0.2)
        d.engine.submit([request(0, (1, 2), 5)])
        await d.finished(0)  # although nobody resumes it

    on_engine(body)


def test_the_clock_of_the_last_step_moves_while_something_is_sampled(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        loop = asyncio.get_running_loop()
        assert d.engine.stepped_at == float("-inf")
        await d.engine.load_weights(d.snapshot(0))
        started = loop.time()
        await d.complete(request(0, (1, 2), 5))
        first = d.engine.stepped_at
        assert started <= first <= loop.time()
        await d.pause_at(request(1, (1, 2), 200, segment_tokens=5))
        await d.engine.load_weights(d.snapshot(1))  # a command later: the step in progress is over
        paused = d.engine.stepped_at
        assert first < paused <= loop.time()
        await d.engine.load_weights(d.snapshot(2))
        assert d.engine.stepped_at == paused
        d.engine.resume()
        await d.finished(1)
        assert d.engine.stepped_at > paused

    on_engine(body)


def test_nothing_is_sampled_while_paused(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        await d.engine.load_weights(d.snapshot(0))
        await d.pause_at(request(0, (1, 2), 100, segment_tokens=2))
        d.engine.submit([request(1, (1,), 3)])
        seen = sum(map(len, d.chunks.values()))
        await d.engine.load_weights(d.snapshot(1))  # a command later: all that was under way is delivered
        assert sum(map(len, d.chunks.values())) == seen
        assert not d.is_finished(1)
        d.engine.resume()
        await d.finished(0, 1)

    on_engine(body)


def test_off_the_device_nothing_is_sampled_and_nothing_is_lost(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        if not d.engine.capabilities.leaves_device:
            pytest.skip("it does not leave its device")
        await d.engine.load_weights(d.snapshot(0))
        (whole,) = await d.complete(request(0, (1, 2), 40, temperature=d.again))
        d.chunks.clear()
        await d.pause_at(request(0, (1, 2), 40, segment_tokens=2, temperature=d.again))
        left = await d.engine.release()
        d.engine.resume()
        d.engine.submit([request(1, (3,), 5), request(2, (3,), 5), request(3, (3,), 5)])
        d.engine.cancel([2])
        await d.finished(2)
        assert d.engine.weights == WeightsId(0, 0)
        before = asyncio.get_running_loop().time()
        assert d.engine.stepped_at >= before, "no request is late"
        assert left.sampled[0] >= 2 and not d.is_finished(0) and 1 not in d.chunks and d.tokens(2) == []
        back = await d.engine.load_weights(d.snapshot(0))
        assert back.sampled[0] == left.sampled[0] and back.delivered >= left.delivered
        await d.finished(0, 1, 3)
        assert d.tokens(0) == whole, "same weights, same seeds: as if it had never left"

    on_engine(body)


def test_back_on_the_device_the_kv_cache_is_that_of_the_new_weights(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        if not d.engine.capabilities.leaves_device:
            pytest.skip("it does not leave its device")
        await d.engine.load_weights(d.snapshot(0))
        await d.pause_at(request(0, (1, 2), 40, segment_tokens=2))
        left = await d.engine.release()
        d.engine.resume()
        await d.engine.release()  # it may be told twice
        await d.engine.load_weights(d.snapshot(2))
        await d.finished(0)
        spans = [(span.version, span.kv_version, span.end - span.start) for c in d.chunks[0] for span in c.spans]
        before = sum(count for version, kv, count in spans if (version, kv) == (0, 0))
        after = sum(count for version, kv, count in spans if (version, kv) == (2, 2))
        assert before == left.sampled[0] and before + after == len(d.tokens(0))

    on_engine(body)


def test_activity_sums_to_the_age(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await d.engine.load_weights(d.snapshot(0))
        before = d.engine.activity()
        await d.complete(*(request(i, (1, 2), 30) for i in range(5)))
        activity = d.engine.activity()
        assert activity.keys() == {"engine_step", "swap", "paused", "idle", "released"}
        assert activity["engine_step"] > before["engine_step"]
        assert all(activity[cause] >= before[cause] for cause in activity)
        assert sum(activity.values()) == pytest.approx(loop.time() - started, abs=0.05)
        await d.engine.stop()
        assert d.engine.activity() == d.engine.activity()

    on_engine(body)


def test_after_stop_nothing_is_accepted(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        d.engine.submit([request(0, (1,), 100)])
        await d.engine.stop()
        await d.engine.stop()
        await d.engine.wait_stopped()
        for call in (d.engine.pause, lambda: d.engine.submit([request(1, (1,))]), lambda: d.engine.cancel([0])):
            with pytest.raises(RuntimeError, match="the engine has stopped"):
                call()
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await d.engine.load_weights(d.snapshot(0))
        assert not d.chunks

    on_engine(body)


def test_capabilities(on_engine: Any) -> None:
    async def body(d: Driver) -> None:
        assert d.engine.capabilities.max_concurrent == SLOTS
        assert d.engine.capabilities.max_length == MAX_LENGTH

    on_engine(body)
