"""What is said to a SGLang server and what comes back, without one (tests/sglang has a real one)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rl.engines.protocol import Request
from async_rl.engines.sglang.contract import (
    ASLEEP,
    EMPTY,
    ContractBroken,
    Piece,
    generate_body,
    half_name,
    new_owner,
    parse_version,
    piece_limit,
    version_name,
)
from async_rl.engines.sglang.push import buckets
from async_rl.wire.messages import VersionSpan, WeightsId


def piece(limit: int = 4, **options: Any) -> Piece:
    return Piece(Request(id=7, prompt=(1, 2), max_new_tokens=limit, key=0, **options), "rid", [1, 2], limit)


def event(entries: list[tuple[float, int]], total: int, **meta: Any) -> dict[str, Any]:
    logprobs = [[logprob, token, None] for logprob, token in entries]
    return {"meta_info": {"output_token_logprobs": logprobs, "completion_tokens": total, "finish_reason": None} | meta}


OWNER = new_owner()


def name(version: int) -> str:
    return version_name(OWNER, WeightsId(0, version))


LENGTH = {"type": "length", "length": 3}


@pytest.mark.parametrize("cumulative", [True, False])
def test_events_of_either_kind_add_up(cumulative: bool) -> None:
    one, tokens = piece(), [(-0.5, 10), (-1.0, 11), (-1.5, 12)]
    versions = [{"version": name(3), "start": 0, "end": 2}, {"version": name(4), "start": 2, "end": 3}]
    news = [
        one.take(event(tokens[:1], 1)),
        one.take(event(tokens[:2] if cumulative else tokens[1:2], 2)),
        one.take(event(tokens if cumulative else tokens[2:], 3, finish_reason=LENGTH, weight_versions=versions)),
    ]
    assert news == [1, 1, 1]
    assert (one.tokens, one.logprobs, one.reason) == ([10, 11, 12], [-0.5, -1.0, -1.5], "length")
    assert one.spans(OWNER, None) == [VersionSpan(0, 2, 3, 3), VersionSpan(2, 3, 4, 4)]
    assert one.spans(OWNER, WeightsId(0, 3)) == [VersionSpan(0, 2, 3, 3), VersionSpan(2, 3, 4, 3)]


def test_the_abort_of_a_request_that_waits_tells_everything_again() -> None:
    one = piece()
    one.take(event([(-0.5, 10)], 1))
    one.take(event([(-1.0, 11)], 2))
    versions = [{"version": name(3), "start": 0, "end": 2}]
    assert one.take(event([(-0.5, 10), (-1.0, 11)], 2, finish_reason={"type": "abort"}, weight_versions=versions)) == 0
    assert (one.tokens, one.reason) == ([10, 11], "abort")


def test_pieces_that_end_before_the_first_event_would_come_are_not_streamed() -> None:
    assert not generate_body([piece(8), piece(3)], stream_tokens=8, salt="")["stream"]
    assert generate_body([piece(3), piece(9)], stream_tokens=8, salt="")["stream"]


def test_what_does_not_add_up_is_refused() -> None:
    one = piece()
    one.take(event([(-0.5, 10)], 1))
    with pytest.raises(ContractBroken, match="1 tokens after 1 do not make 4"):
        one.take(event([(-1.0, 11)], 4))
    versions = [{"version": name(3), "start": 0, "end": 1}]
    with pytest.raises(ContractBroken, match="versions of 1 tokens, there are 2"):
        one.take(event([(-1.0, 11)], 2, finish_reason=LENGTH, weight_versions=versions))


@pytest.mark.parametrize(
    "version", ["default", "0.3", half_name(OWNER), version_name(new_owner(), WeightsId(0, 3))], ids=itertools.count()
)
def test_weights_of_somebody_else_have_no_spans(version: str) -> None:
    one = piece()
    versions = [{"version": version, "start": 0, "end": 1}]
    one.take(event([(-0.5, 10)], 1, finish_reason=LENGTH, weight_versions=versions))
    assert one.spans(OWNER, None) is None


def test_lineages_of_one_engine_meet_in_a_piece() -> None:
    one = piece()
    names = [version_name(OWNER, WeightsId(0, 9)), half_name(OWNER), version_name(OWNER, WeightsId(1, 4))]
    cuts = [0, 1, 1, 2]
    versions = [{"version": v, "start": s, "end": e} for v, s, e in zip(names, cuts, cuts[1:], strict=False)]
    one.take(event([(-0.5, 10), (-0.5, 11)], 2, finish_reason=LENGTH, weight_versions=versions))
    assert one.spans(OWNER, None) == [VersionSpan(0, 1, 9, 9), VersionSpan(1, 2, 4, 4)]


def test_later_engines_sort_behind_earlier_ones() -> None:
    owners = [new_owner() for _ in range(100)]
    assert owners == sorted(set(owners))


def test_ending_tokens_are_the_request_s_own() -> None:
    body = generate_body([piece(stop=frozenset({4, 3})), piece()], stream_tokens=8, salt="")
    first, second = body["sampling_params"]
    assert (first["stop_token_ids"], first["ignore_eos"]) == ([3, 4], False)
    assert (second["stop_token_ids"], second["ignore_eos"]) == ([], True)
    assert "extra_key" not in body
    assert generate_body([piece(), piece()], stream_tokens=8, salt="0.3")["extra_key"] == ["0.3", "0.3"]


@given(st.integers(0, 9), st.integers(-1, 10**6))
def test_versions_survive_the_server(lineage: int, version: int) -> None:
    weights = WeightsId(lineage, version)
    assert parse_version(version_name(OWNER, weights)) == (OWNER, weights)


@pytest.mark.parametrize(
    "text",
    [
        "default",
        "v0",
        "3",
        "",
        "a.1",
        "1.b",
        ".",
        "0.3",
        "a.0.3",
        f"{OWNER}.0",
        f"{OWNER}.0.3.1",
        ASLEEP,
        EMPTY,
        half_name(OWNER),
    ],
    ids=itertools.count(),
)
def test_what_is_not_a_version_of_ours(text: str) -> None:
    assert parse_version(text) is None


@given(st.integers(1, 300), st.integers(1, 300), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 300))
def test_pieces_reach_the_end_without_beginning_too_late(
    prompt: int, tokens: int, segment: int | None, max_input: int
) -> None:
    prompt = min(prompt, max_input)
    position, left = prompt, tokens
    while left:
        assert position <= max_input
        limit = piece_limit(position, left, segment, max_input)
        assert 1 <= limit <= left
        position, left = position + limit, left - limit


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(4, 100))
def test_buckets_hold_every_tensor_once_and_in_order(sizes: list[int], nbytes: int) -> None:
    tensors = {str(i): torch.full((size,), i, dtype=torch.float32) for i, size in enumerate(sizes)}
    parts = list(buckets(tensors, nbytes))
    assert [name for part in parts for name in part.names] == list(tensors)
    assert torch.cat([part.flat() for part in parts]).view(torch.float32).equal(torch.cat(list(tensors.values())))
    assert all(part.flat().numel() <= nbytes or len(part.names) == 1 for part in parts)
