"""The wire contract: what goes in comes out, and what does not belong is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.errors import ProtocolError
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.messages import (
    Credit,
    Finished,
    Heartbeat,
    MicroBatches,
    RolloutResult,
    Sequence,
    TrainRollout,
    VersionSpan,
    WeightsId,
)

numbers = st.integers(0, 2**40)
sequences = st.builds(
    Sequence,
    st.binary(max_size=64),
    st.binary(max_size=64),
    st.lists(st.builds(VersionSpan, numbers, numbers, numbers, numbers), max_size=3),
)
results = st.builds(
    RolloutResult,
    st.integers(0, 1000),
    st.lists(sequences, max_size=3),
    st.floats(allow_nan=False),
    st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3),
)
finished = st.builds(
    Finished, numbers, st.sampled_from(["train", "eval"]), st.lists(results, max_size=3), st.just(WeightsId(0, 3))
)


@given(st.lists(finished, max_size=3), st.integers(0, 2**31))
def test_generator_frames_round_trip(messages: list[Finished], epoch: int) -> None:
    ours = rollout_stream()
    frame = ours.decode(ours.mirror.encode(epoch, list(messages)))
    assert frame.epoch == epoch and frame.messages == messages


@given(st.lists(sequences, max_size=3))
def test_batches_round_trip(found: list[Sequence]) -> None:
    batch = MicroBatches(3, 3, [TrainRollout(1, 2, 0.5, found)], [[[0]]])
    ours = training_stream()
    assert ours.mirror.decode(ours.encode(7, [batch])).messages == [batch]


def test_the_other_sides_messages_are_refused() -> None:
    ours = rollout_stream()
    with pytest.raises(ProtocolError, match="Credit"):
        ours.mirror.decode(ours.mirror.encode(1, [Credit(5)]))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    try:
        rollout_stream().decode(data)
    except ProtocolError:
        return


def test_a_wrong_type_names_the_field() -> None:
    ours = rollout_stream()
    good = ours.mirror.encode(1, [Heartbeat(None, WeightsId(0, 1))])
    with pytest.raises(ProtocolError, match="weights"):
        ours.decode(good.replace(b"\x92\x00\x01", b"\x92\xa1x\x01"))
