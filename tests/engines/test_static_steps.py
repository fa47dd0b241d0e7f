"""Decode steps of fixed shapes, and a host that looks at them one step late. tests/engines/test_batcher.py runs all its
cases on them too; a GPU adds nothing but recording and replaying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    assert_covers,
    configs,
    finish,
    finish_in_pieces,
    make_batcher,
    make_model,
    prompts,
    request,
    run,
    swap,
)

from async_rl.engines.batcher import Batcher
from async_rl.engines.static_steps import StaticSteps

Model = Any


@pytest.fixture(scope="module")
def llama() -> Model:
    return make_model(configs()["llama"])


def steps_of(batcher: Batcher) -> StaticSteps:
    steps = batcher._steps
    assert isinstance(steps, StaticSteps)
    return steps


class Shapes:
    """In the place of CUDA graphs: which shapes were asked for, and when recordings had to be forgotten."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.cleared = 0

    def __call__(self, key: object, work: Callable[[], None]) -> None:
        self.keys.append(key)
        work()

    def clear(self) -> None:
        self.cleared += 1


def watched(model: Model, **options: Any) -> tuple[Batcher, Shapes]:
    batcher, shapes = make_batcher(model, steps="static", **options), Shapes()
    steps_of(batcher)._recorder = shapes
    return batcher, shapes


@pytest.mark.parametrize("name", list(configs()))
def test_equals_steps_of_the_lengths_there_are(name: str) -> None:
    model = make_model(configs()[name])
    temperatures = (1.0, 0.0, 0.7)
    requests = [
        request(i, prompt, 2 + 5 * (i % 7), temperature=temperatures[i % 3], stop=frozenset(range(i % 3)))
        for i, prompt in enumerate(prompts(23, longest=60))
    ]
    eager, static = (run(make_batcher(model, slots=6, steps=kind), requests) for kind in ("eager", "static"))
    for one in requests:
        assert static[one.id].tokens.tolist() == eager[one.id].tokens.tolist()
        assert static[one.id].finish_reason == eager[one.id].finish_reason
        assert static[one.id].spans == eager[one.id].spans
        assert np.abs(static[one.id].logprobs - eager[one.id].logprobs).max() < 2e-5


def test_few_shapes_and_few_recordings(llama: Model) -> None:
    batcher, shapes = watched(llama, slots=6)
    run(batcher, [request(i, prompt, 3 + i) for i, prompt in enumerate(prompts(17))])
    assert {key[0] for key in shapes.keys} == {1, 2, 4, 6}
    assert {key[1] for key in shapes.keys} == {200}  # no longer than a sequence may be
    assert shapes.cleared == 1  # before the first


def test_recordings_are_forgotten_when_an_address_changes(llama: Model) -> None:
    batcher, shapes = watched(llama)
    batcher.submit([request(0, (1, 2), 60), request(1, (3,), 60)])
    batcher.step()
    live = batcher._live
    assert shapes.cleared == 1
    swap(batcher, make_model(llama.config, seed=3), 1)
    batcher.step()
    assert batcher._live is live and shapes.cleared == 1  # copied into the tensors that are there
    batcher.submit([request(2, (4,), 60, stop=frozenset({50, 51, 52}))])
    batcher.step()
    assert shapes.cleared == 2
    batcher.release()
    assert shapes.cleared == 3
    swap(batcher, llama, 2)
    batcher.step()
    assert shapes.cleared == 4 and batcher._live is not live
    finish(batcher)


def test_the_cache_grows_by_buckets() -> None:
    config = configs()["llama"]
    config.max_position_embeddings = 1200
    batcher, shapes = watched(make_model(config), max_length=0)
    run(batcher, [request(0, tuple(range(50)) * 4, 400)])
    assert sorted({key[1] for key in shapes.keys}) == [256, 512, 1024]
    assert shapes.cleared == 3


def test_a_sequence_ends_a_step_late_without_more_tokens(llama: Model) -> None:
    batcher = make_batcher(llama, slots=2, steps="static")
    batcher.submit([request(0, (1, 2, 3), 3), request(1, (1, 2, 3), 9)])
    assert batcher.step() == batcher.step() == []  # three tokens are there now
    assert batcher.sampled() == {0: 3, 1: 3}
    (chunk,) = batcher.step()
    assert (chunk.request_id, len(chunk.tokens), chunk.finish_reason) == (0, 3, "length")
    assert_covers(chunk)
    assert batcher.sampled() == {1: 4}


def test_what_is_settled_before_a_swap_ends_before_it(llama: Model) -> None:
    batcher = make_batcher(llama, slots=2, version=1, steps="static")
    batcher.submit([request(0, (1, 2, 3), 3), request(1, (1, 2, 3), 6)])
    batcher.step()
    batcher.step()
    (ended,) = batcher.settle()
    assert ended.request_id == 0 and batcher.settle() == [] and batcher.sampled() == {1: 3}
    swap(batcher, llama, 2)
    assert [(span.start, span.end, span.version) for span in finish(batcher)[1].spans] == [(0, 3, 1), (3, 6, 2)]


def test_a_cancelled_request_that_had_ended_is_not_aborted(llama: Model) -> None:
    batcher = make_batcher(llama, slots=2, steps="static")
    batcher.submit([request(0, (1, 2, 3), 3), request(1, (1, 2, 3), 9)])
    batcher.step()
    batcher.step()
    chunks = batcher.cancel([0, 1])
    assert [(c.request_id, len(c.tokens), c.finish_reason) for c in chunks] == [(0, 3, "length"), (1, 3, "aborted")]
    assert not batcher.has_work


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_segments_are_whole(llama: Model, segment: int) -> None:
    batcher = make_batcher(llama, slots=3, steps="static")
    requests = [request(i, (1, 2, 3 + i), 9, segment_tokens=segment) for i in range(4)]
    whole = run(make_batcher(llama), [request(one.id, one.prompt, 9) for one in requests])
    batcher.submit(requests)
    pieces = finish_in_pieces(batcher)
    for one in requests:
        found = pieces[one.id]
        assert {len(chunk.tokens) for chunk in found[:-1]} <= {segment}
        assert [chunk.finish_reason for chunk in found] == [None] * (len(found) - 1) + ["length"]
        assert [t for chunk in found for t in chunk.tokens.tolist()] == whole[one.id].tokens.tolist()


def test_the_last_position_of_every_slot(llama: Model) -> None:
    """The token that is one too many has a place of its own."""
    requests = [request(i, tuple(range(50)), 150) for i in range(2)]
    batcher = make_batcher(llama, slots=2, steps="static")
    chunks = run(batcher, requests)
    eager = run(make_batcher(llama, slots=2), requests)
    for one in requests:
        assert chunks[one.id].tokens.tolist() == eager[one.id].tokens.tolist()


def test_free_slots_keep_to_themselves(llama: Model) -> None:
    """What is computed for the rows that fill a bucket changes nothing and stays finite."""
    batcher = make_batcher(llama, slots=8, steps="static")
    run(batcher, [request(i, prompt, 12) for i, prompt in enumerate(prompts(8))])
    one = request(9, (5, 6, 7), 30)
    batcher.submit([one, request(10, (8,), 30), request(11, (9,), 30)])
    chunks = finish(batcher)
    assert chunks[9].tokens.tolist() == run(make_batcher(llama), [one])[9].tokens.tolist()
    assert torch.isfinite(batcher._cache.read(0, 0, 8, 200)[1]).all()
