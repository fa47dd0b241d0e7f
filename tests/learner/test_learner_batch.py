"""A message that breaks the wire contract is refused by name; packing orders by length, feeds no token in vain and a
common prompt once."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_cases import message, ragged_rollouts

from async_rl.errors import ProtocolError
from async_rl.learner.batch import flatten, pack
from async_rl.learner.families import Block, Family
from async_rl.wire.messages import Sequence, TrainRollout, VersionSpan


def rollout(group: int, member: int, length: int, *spans: tuple[int, int, int]) -> TrainRollout:
    tokens, logprobs = np.arange(length, dtype="<i4"), np.full(length, -1, "<f4")
    given = [VersionSpan(start, end, version, version) for start, end, version in spans]
    return TrainRollout(group, member, 1.0, [Sequence(tokens.tobytes(), logprobs.tobytes(), given)])


def test_equal_lengths_are_one_block_and_the_tail_is_not_fed() -> None:
    rollouts = [rollout(0, 0, 6, (3, 5, 1)), rollout(0, 1, 9, (5, 9, 1)), rollout(0, 2, 5, (4, 5, 0))]
    microbatch = pack(flatten(message(rollouts)), [1, 2, 0])
    own = Family(0, (Block(2, 4), Block(1, 8)))
    assert microbatch.tokens.families == (own,)  # up to the token before the last trainable one
    assert microbatch.tokens.input_1T.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert torch.equal(microbatch.tokens.position_1T, microbatch.tokens.input_1T)
    assert microbatch.tokens.target_K.tolist() == [4, 3, 4, 5, 6, 7, 8]
    assert microbatch.sample_K.tolist() == [1, 2, 2, 0, 0, 0, 0]
    assert microbatch.version_K.tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert microbatch.rollout_n.tolist() == [1, 2, 0]


def test_a_common_prompt_is_fed_once() -> None:
    """Prompts 0 1 2 in group 0; group 1 says the same, but is another group; one rollout has nothing after it."""
    rollouts = [
        rollout(0, 0, 6, (3, 6, 1)),
        rollout(1, 0, 6, (3, 6, 1)),
        rollout(0, 1, 5, (3, 5, 1)),
        rollout(0, 2, 4, (3, 4, 1)),
    ]
    microbatch = pack(flatten(message(rollouts)), range(4))
    assert microbatch.tokens.families == (Family(0, (Block(1, 5),)), Family(3, (Block(1, 1), Block(1, 2))))
    assert microbatch.tokens.input_1T.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 3, 4]]
    assert torch.equal(microbatch.tokens.position_1T, microbatch.tokens.input_1T)
    assert microbatch.sample_K.tolist() == [1, 1, 1, 3, 2, 2, 0, 0, 0]
    assert microbatch.tokens.target_K.tolist() == [3, 4, 5, 3, 3, 4, 3, 4, 5]
    assert microbatch.tokens.predictor_K.tolist() == [2, 3, 4, 7, 7, 8, 7, 9, 10]
    assert pack(flatten(message(rollouts)), range(4), share_prompts=False).tokens.input_1T.shape == (1, 17)


@given(st.integers(0, 2**32 - 1), st.integers(1, 16))
def test_every_sampled_token_is_trained_on_once(seed: int, take: int) -> None:
    rollouts = ragged_rollouts(seed)
    step = flatten(message(rollouts))
    chosen = np.random.default_rng(seed).permutation(16)[:take].tolist()
    microbatch = pack(step, chosen)
    assert sum(family.tokens for family in microbatch.tokens.families) == microbatch.tokens.input_1T.shape[1]
    for family in microbatch.tokens.families:
        lengths = [block.length for block in family.blocks]
        assert lengths == sorted(set(lengths)) and 0 not in lengths
    expected = sorted(
        (local, int(np.frombuffer(s.tokens, "<i4")[t]), float(np.frombuffer(s.logprobs, "<f4")[t]), span.version)
        for local, index in enumerate(chosen)
        for s in rollouts[index].sequences
        for span in s.spans
        for t in range(span.start, span.end)
    )
    columns = (microbatch.sample_K, microbatch.tokens.target_K, microbatch.behaviour_K, microbatch.version_K)
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == expected


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([(0, 2, 1)], "not within tokens"),
        ([(2, 2, 1)], "a span is empty"),
        ([(4, 7, 1)], "not within tokens"),
        ([(1, 4, 1), (3, 5, 1)], "overlap"),
        ([(3, 5, 1), (1, 2, 1)], "out of order"),
        ([(1, 4, 4)], r"outside \[0, 3\]"),
        ([(1, 4, -1)], r"outside \[0, 3\]"),
    ],
)
def test_bad_spans_are_refused(spans: list[tuple[int, int, int]], said: str) -> None:
    with pytest.raises(ProtocolError, match=f"rollout 5 of group 9: .*{said}"):
        flatten(message([rollout(0, 0, 6, (2, 4, 1)), rollout(9, 5, 6, *spans)]))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([[[0]]], "every rollout exactly once"),
        ([[[0, 1, 1]]], "every rollout exactly once"),
        ([[[0]], [[1]]], "for 2 ranks, there are 1"),
    ],
)
def test_bad_plans_are_refused(plan: Any, said: str) -> None:
    rollouts = [rollout(0, i, 6, (2, 4, 1)) for i in range(2)]
    with pytest.raises(ProtocolError, match=said):
        flatten(message(rollouts, plan))
    with pytest.raises(ProtocolError, match="unequal numbers of micro-batches"):
        flatten(message(rollouts, [[[0], [1]], [[]]]), ranks=2)


def test_tokens_and_logprobs_of_unequal_length_are_refused() -> None:
    good = rollout(1, 2, 6, (2, 4, 1))
    short = msgspec.structs.replace(good.sequences[0], logprobs=good.sequences[0].logprobs[:-4])
    with pytest.raises(ProtocolError, match="rollout 2 of group 1: unequal"):
        flatten(message([msgspec.structs.replace(good, sequences=[short])]))
