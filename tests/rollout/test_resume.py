"""Segments, and rollouts that go on from them: with the same weights nobody can tell that they were interrupted."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rollout_cases import Episode, Hosted, conversation, fake, hosted, lease, one_turn, weights

from async_rl.config import Model, TinyModel
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Snapshot
from async_rl.environments.api import Policy
from async_rl.models.loading import build_model, load_config
from async_rl.rollout.segments import prompt_crc
from async_rl.wire.messages import Finished, GroupLease, RolloutResult, Segment, Task, VersionSpan, WeightsId

Run = Callable[[Any], Any]
MEMBERS = [0, 1, 2]


def tokens(segment: Segment) -> int:
    return len(segment.tokens) // 4


def of(segments: list[Segment], member: int) -> list[Segment]:
    return [segment for segment in segments if segment.member == member]


def ends(message: Finished, member: int) -> bool:
    return member in [result.member for result in message.members]


def by_member(results: list[RolloutResult]) -> list[RolloutResult]:
    return sorted(results, key=lambda result: result.member)


async def lease_after_lease(running: Hosted, one: GroupLease) -> tuple[list[RolloutResult], list[list[Segment]]]:
    """Until every member is finished: the results, and the segments of each lease."""
    results: list[RolloutResult] = []
    leases: list[list[Segment]] = []
    while one.members:
        await running.run(one)
        assert not running.failures
        results += running.results
        leases.append(running.segments)
        left = [segment.member for segment in running.segments if segment.yielded]
        one = msgspec.structs.replace(one, members=left, segments=[*one.segments, *running.segments])
    return by_member(results), leases


@pytest.mark.parametrize("episode", [one_turn, conversation])
def test_interrupted_after_any_segment_it_ends_the_same(virtual: Run, episode: Episode) -> None:
    async def main() -> None:
        async with hosted(episode) as running:
            asked = lease(members=MEMBERS, segment_tokens=16)
            await running.run(asked)
            whole, segments = by_member(running.results), running.segments
            assert len(segments) > 6
            for member in MEMBERS:
                mine = of(segments, member)
                for cut in range(len(mine) + 1):
                    resumed = msgspec.structs.replace(asked, members=[member], segments=mine[:cut])
                    await running.run(resumed)
                    assert running.results == [whole[member]]
                    assert running.segments == mine[cut:]

    virtual(main())


@pytest.mark.parametrize("episode", [one_turn, conversation])
def test_segments_join_and_come_before_the_end(virtual: Run, episode: Episode) -> None:
    async def main() -> None:
        async with hosted(episode) as running:
            await running.run(lease(members=MEMBERS, segment_tokens=16))
            calls = 4 if episode is conversation else 1
            for member in MEMBERS:
                mine = of(running.segments, member)
                (end,) = (i for i, m in enumerate(running.reported) if isinstance(m, Finished) and ends(m, member))
                assert all(running.reported.index(segment) < end for segment in mine)
                assert {segment.call for segment in mine} <= set(range(calls))
                for call in range(calls):
                    joined = 0
                    pieces = [segment for segment in mine if segment.call == call]
                    for i, segment in enumerate(pieces):
                        assert segment.start == joined
                        joined += tokens(segment)
                        last = i == len(pieces) - 1 and call < calls - 1  # the last call ends with Finished
                        assert (segment.finish_reason is not None) == last
                        assert last or tokens(segment) == 16
                        assert segment.spans == [VersionSpan(0, tokens(segment), 0, 0)]

    virtual(main())


def test_a_short_rollout_of_one_turn_sends_no_segment(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn) as running:
            await running.run(lease(members=MEMBERS, segment_tokens=100))
            assert len(running.results) == 3 and not running.segments

    virtual(main())


@pytest.mark.parametrize("episode", [one_turn, conversation])
@pytest.mark.parametrize("segment_tokens", [0, 7, 16])
def test_a_rollout_that_yields_and_goes_on_is_the_same(virtual: Run, episode: Episode, segment_tokens: int) -> None:
    async def main() -> None:
        async with hosted(episode) as running:
            await running.run(lease(members=MEMBERS))
            assert not running.segments
            whole = by_member(running.results)
            asked = lease(members=MEMBERS, segment_tokens=segment_tokens, lease_tokens=20)
            results, leases = await lease_after_lease(running, asked)
            assert results == whole
            assert len(leases) > 2
            for segments in leases:
                for member in MEMBERS:
                    mine = of(segments, member)
                    assert sum(map(tokens, mine)) <= 20
                    assert not any(segment.yielded for segment in mine[:-1])
                    assert not mine or not mine[-1].yielded or sum(map(tokens, mine)) == 20
            everything = [segment for segments in leases for segment in segments]
            assert all(segment.finish_reason is None for segment in everything if segment.yielded)

    virtual(main())


def test_a_budget_that_ends_with_a_call_is_yielded_at_the_next(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(conversation, fake(median_tokens=20, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(lease_tokens=20))
            first, second = running.segments
            assert (first.call, tokens(first), first.finish_reason, first.yielded) == (0, 20, "eos", False)
            assert (second.call, second.start, tokens(second), second.yielded) == (1, 0, 0, True)
            resumed = lease(lease_tokens=20, segments=running.segments)
            await running.run(resumed)
            assert [segment.call for segment in running.segments] == [1, 2]

    virtual(main())


def test_a_call_that_ends_at_its_own_limit_does_not_yield(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(median_tokens=200, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(max_new_tokens=20, lease_tokens=20))
            assert [result.finish_reason for result in running.results] == ["length"] and not running.segments

    virtual(main())


async def handed_back(running: Hosted, asked: GroupLease, after_s: float) -> tuple[list[RolloutResult], int]:
    """The results where every member is wanted back `after_s` seconds into the first two leases, and how many there
    were."""
    results: list[RolloutResult] = []
    segments: list[Segment] = []
    leases, left = 0, list(asked.members)
    while left:
        loop = asyncio.get_running_loop()
        if leases < 2:
            loop.call_later(after_s, running.host.hand_back, asked.group_id, left)
        await running.run(msgspec.structs.replace(asked, members=left, segments=segments))
        assert not running.failures
        results += running.results
        segments += running.segments
        left = [segment.member for segment in running.segments if segment.yielded]
        leases += 1
    return by_member(results), leases


@pytest.mark.parametrize("episode", [one_turn, conversation])
@pytest.mark.parametrize("segment_tokens", [0, 16])
def test_handed_back_at_any_moment_it_ends_the_same(virtual: Run, episode: Episode, segment_tokens: int) -> None:
    """In the engine, before the engine has it, in the environment, at its last token."""

    async def main() -> None:
        async with hosted(episode) as running:
            asked = lease(members=MEMBERS, segment_tokens=segment_tokens)
            await running.run(asked)
            whole = by_member(running.results)
            interrupted = 0
            for after_s in [0.012 + 0.0173 * i for i in range(20)]:
                results, leases = await handed_back(running, asked, after_s)
                assert results == whole
                interrupted += leases > 1
            assert interrupted > 10

    virtual(main())


def test_what_is_handed_back_before_its_first_token_begins_anew(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn) as running:
            running.host.start([lease()])
            await asyncio.sleep(0)  # it has asked, and nothing was submitted yet
            running.host.hand_back(7, [0])
            await running.until(lambda: running.ended == 1)
            (segment,) = running.segments
            assert segment.yielded and tokens(segment) == 0

    virtual(main())


def test_evaluation_is_not_handed_back(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn) as running:
            await running.run(lease(purpose="eval"))
            whole = running.results
            asyncio.get_running_loop().call_later(0.1, running.host.hand_back, 7, [0])
            await running.run(lease(purpose="eval"))
            assert running.results == whole and not running.segments

    virtual(main())


def test_evaluation_is_neither_persisted_nor_cut_short(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(conversation) as running:
            await running.run(lease(members=MEMBERS, purpose="eval", segment_tokens=5, lease_tokens=5))
            assert len(running.results) == 3 and not running.segments

    virtual(main())


def test_resumed_under_newer_weights_the_old_tokens_keep_their_version(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(segment_tokens=25))
            segments, (whole,) = running.segments, running.results
            await running.engine.load_weights(weights(3))
            await running.run(lease(segment_tokens=25, segments=segments[:1]))
            (resumed,) = running.results
            (old,), (new,) = whole.sequences, resumed.sequences
            assert new.spans == [VersionSpan(3, 28, 0, 0), VersionSpan(28, 63, 3, 3)]
            assert (new.tokens, new.logprobs) == (old.tokens, old.logprobs)  # a fake engine has no weights

    virtual(main())


def test_what_was_recorded_of_another_prompt_is_discarded(virtual: Run) -> None:
    said = [9]

    async def moody(task: Task, policy: Policy) -> float:
        first = await policy.complete([1, 2])
        second = await policy.complete([*said, *first.tokens[:3]])
        await policy.complete([3, *second.tokens])
        return 1.0

    async def main() -> None:
        async with hosted(moody) as running:
            await running.run(lease(segment_tokens=8))
            segments, (whole,) = running.segments, running.results
            assert {segment.call for segment in segments} == {0, 1, 2}
            said[0] = 8
            await running.run(lease(segment_tokens=8, segments=segments))
            again, (resumed,) = running.segments, running.results
            assert (again[0].call, again[0].start) == (3, 0), "no call of that number has another prompt"
            assert again[0].prompt not in {segment.prompt for segment in segments}
            assert resumed.sequences[0] == whole.sequences[0]
            assert all(one.tokens != whole.sequences[1].tokens for one in resumed.sequences)

    virtual(main())


def test_a_recorded_call_longer_than_a_lowered_limit_ends_there(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(segment_tokens=25))
            await running.run(lease(segment_tokens=25, max_new_tokens=25, segments=running.segments[:1]))
            (resumed,) = running.results
            assert (resumed.finish_reason, resumed.sequences[0].spans) == ("length", [VersionSpan(3, 28, 0, 0)])

    virtual(main())


def test_what_no_lease_could_finish_is_refused_by_the_first(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(max_length=100)) as running:
            await running.engine.load_weights(weights(0))
            for lease_tokens in (0, 10):
                await running.run(lease(max_new_tokens=98, lease_tokens=lease_tokens))
                (reason,) = running.failures
                assert reason.endswith("max_new_tokens = 98 after a prompt of 3: a sequence holds at most 100 tokens")
                assert not running.segments

    virtual(main())


def test_segments_that_do_not_join_are_sampled_again(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(segment_tokens=10))
            segments, whole = running.segments, running.results
            await running.run(lease(segment_tokens=10, segments=[segments[0], *segments[2:]]))
            assert running.results == whole and running.segments == segments[1:]

    virtual(main())


def test_an_environment_may_give_up_a_call(virtual: Run) -> None:
    async def impatient(task: Task, policy: Policy) -> float:
        try:
            async with asyncio.timeout(0.055):
                await policy.complete([1])
        except TimeoutError:
            pass
        await policy.complete([2])
        await policy.complete([3])
        return 1.0

    async def main() -> None:
        async with hosted(impatient, fake(slots=1, median_tokens=20, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(segment_tokens=50))
            (whole,) = running.results
            assert len(whole.sequences) == 2  # nothing is trained on of the first
            assert [(s.call, tokens(s), s.finish_reason) for s in running.segments] == [(1, 20, "eos")]
            await running.run(lease(segment_tokens=50, segments=running.segments))
            assert running.results == [whole] and not running.segments

    virtual(main())


def test_a_rollout_that_left_says_no_more(virtual: Run) -> None:
    async def stubborn(task: Task, policy: Policy) -> float:
        for _ in range(3):
            try:
                await policy.complete([1])
            except asyncio.CancelledError:
                continue
        return 1.0

    async def main() -> None:
        async with hosted(stubborn, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(lease_tokens=10))
            await asyncio.sleep(10)
            (segment,) = running.reported
            assert isinstance(segment, Segment) and segment.yielded
            running.reported.clear()
            running.host.start([lease(segment_tokens=10)])
            await asyncio.sleep(0.15)
            running.host.cancel(7, [0])
            await asyncio.sleep(10)
            (segment,) = running.reported
            assert isinstance(segment, Segment) and (segment.start, tokens(segment)) == (0, 10)

    virtual(main())


def test_a_prompt_is_known_by_the_crc_of_its_bytes() -> None:
    assert prompt_crc((1, 258)) == zlib.crc32(b"\x01\0\0\0\x02\x01\0\0")


@pytest.mark.parametrize("episode", [one_turn, conversation])
def test_on_a_model_the_resumed_tokens_are_the_same(real: Run, episode: Episode) -> None:
    tiny = Model(tiny=TinyModel(characters="0123456789", hidden_size=32, layers=2, max_length=512))

    async def main() -> None:
        engine = EmbeddedEngine(load_config(tiny), slots=4, dtype=torch.float32)
        async with hosted(episode, engine) as running:
            model: Any = build_model(tiny, seed=1)
            await engine.load_weights(Snapshot(WeightsId(0, 0), dict(model.named_parameters())))
            asked = lease(members=MEMBERS, max_new_tokens=50, segment_tokens=16)
            await running.run(asked)
            whole, segments = by_member(running.results), running.segments
            for cut in (1, 2, 3):
                some = [segment for member in MEMBERS for segment in of(segments, member)[:cut]]
                await running.run(msgspec.structs.replace(asked, segments=some))
                assert_same(by_member(running.results), whole)
            results, leases = await lease_after_lease(running, msgspec.structs.replace(asked, lease_tokens=30))
            assert len(leases) > 1
            assert_same(results, whole)

    real(main())


def assert_same(results: list[RolloutResult], others: list[RolloutResult]) -> None:
    """A prompt is computed in another order than tokens one by one: log-probs differ in the last digits."""
    for result, other in zip(results, others, strict=True):
        for one, two in zip(result.sequences, other.sequences, strict=True):
            assert (one.tokens, one.spans) == (two.tokens, two.spans)
            ours, theirs = np.frombuffer(one.logprobs, np.float32), np.frombuffer(two.logprobs, np.float32)
            assert np.abs(ours - theirs).max() < 2e-5
