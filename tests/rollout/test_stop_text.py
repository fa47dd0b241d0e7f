"""Texts that end a reply: what is recorded is what was sampled up to them, however it comes in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from rollout_cases import fake, hosted, lease, weights

from async_rl.environments.api import Policy
from async_rl.rollout.stop_text import before_stop, tokens_to_stop
from async_rl.simulate.cluster import NumberText
from async_rl.wire.messages import Task

Run = Callable[[Any], Any]


def test_a_stop_is_found_where_it_is_whole() -> None:
    text = NumberText()
    assert text.decode([1, 23, 4, 23, 4]) == "1 23 4 23 4"
    assert tokens_to_stop(text, [1, 23, 4, 23, 4], ["3 4"]) == 3
    assert tokens_to_stop(text, [1, 23, 4, 23, 4], ["9", "1"]) == 1
    assert tokens_to_stop(text, [1, 23, 4], ["9"]) is None
    assert tokens_to_stop(text, [1], []) is None and tokens_to_stop(text, [], ["1"]) is None
    assert before_stop("1 23 4 23 4", ["9", "3 4"]) == "1 2"
    assert before_stop("1 23", []) == "1 23"


@pytest.mark.parametrize("where", [0, 7, 33])
@pytest.mark.parametrize("segment_tokens", [0, 5, 40])
def test_it_ends_there_also_when_it_was_interrupted(virtual: Run, where: int, segment_tokens: int) -> None:
    stops: list[str] = []
    said: list[tuple[str, str]] = []

    async def episode(task: Task, policy: Policy) -> float:
        reply = await policy.complete([1, 2], stop=stops)
        said.append((reply.text, reply.finish_reason))
        await policy.complete([3])
        return 1.0

    async def main() -> None:
        async with hosted(episode, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease())
            whole = np.frombuffer(running.results[0].sequences[0].tokens, np.int32)[2:].tolist()
            stops.append(NumberText().decode(whole[where : where + 3]))
            first = tokens_to_stop(NumberText(), whole, stops)
            asked = lease(segment_tokens=segment_tokens)
            await running.run(asked)
            (result,), segments = running.results, running.segments
            sequence = result.sequences[0]
            assert np.frombuffer(sequence.tokens, np.int32).tolist() == [1, 2, *whole[:first]]
            assert [(span.start, span.end) for span in sequence.spans] == [(2, 2 + (first or 0))]
            assert said[-1] == (before_stop(NumberText().decode(whole), stops), "stop")
            of_the_first = [segment for segment in segments if segment.call == 0]
            assert sum(len(segment.tokens) // 4 for segment in of_the_first) == (first if segment_tokens else 0)
            for cut in range(len(segments) + 1):
                await running.run(msgspec.structs.replace(asked, segments=segments[:cut]))
                assert running.results == [result] and said[-1] == said[1]
            asyncio.get_running_loop().call_later(0.105, running.host.hand_back, 7, [0])
            await running.run(asked)
            if where == 33:
                assert running.segments[-1].yielded
            await running.run(msgspec.structs.replace(asked, segments=running.segments))
            assert running.results == [result] and said[-1] == said[1]

    virtual(main())
