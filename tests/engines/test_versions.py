from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from async_rl.engines.versions import VersionLog
from async_rl.wire.messages import VersionSpan


def test_a_swap_changes_exactly_the_tokens_after_it() -> None:
    log = VersionLog()
    log.swap(0, 4)
    entry = log.enter(10)  # token 0 at tick 10
    log.swap(12, 5)  # tokens 0, 1, 2 are sampled
    assert log.spans(entry, 0, 6) == [VersionSpan(0, 3, 4, 4), VersionSpan(3, 6, 5, 4)]
    assert log.spans(entry, 2, 4) == [VersionSpan(0, 1, 4, 4), VersionSpan(1, 2, 5, 4)]
    assert log.spans(entry, 0, 3) == [VersionSpan(0, 3, 4, 4)]
    assert log.spans(entry, 3, 5) == [VersionSpan(0, 2, 5, 4)]
    assert log.spans(entry, 3, 3) == []
    assert log.spans(log.enter(12), 0, 2) == [VersionSpan(0, 2, 5, 5)]


def test_a_cache_computed_anew_is_as_young_as_its_weights() -> None:
    log = VersionLog()
    log.swap(0, 4)
    entry = log.enter(10)
    log.swap(11, 5)  # keeps the cache
    log.swap(13, 5, recomputed=True)  # the same weights, after the device was left
    log.swap(15, 6, recomputed=True)
    spans = [(2, 4, 4), (4, 5, 4), (6, 5, 5), (9, 6, 6)]
    starts = [0, 2, 4, 6]
    expected = [VersionSpan(start, *span) for start, span in zip(starts, spans, strict=True)]
    assert log.spans(entry, 0, 9) == expected
    assert log.spans(entry, 3, 5) == [VersionSpan(0, 1, 5, 4), VersionSpan(1, 2, 5, 5)]


@given(
    events=st.lists(st.sampled_from(["tick", "swap", "same"]), max_size=30),
    first=st.integers(0, 30),
    last=st.integers(0, 30),
)
def test_spans_equal_a_list_per_token(events: list[str], first: int, last: int) -> None:
    log = VersionLog()
    log.swap(0, 1)
    tick = version = 1
    entry = log.enter(tick)
    per_token = [version]
    for event in events:
        if event == "tick":
            tick += 1
            per_token.append(version)
        else:
            version += event == "swap"
            log.swap(tick, version)
    last = min(last, len(per_token))
    spans = log.spans(entry, first, last)
    expanded = [span.version for span in spans for _ in range(span.end - span.start)]
    assert expanded == per_token[first:last]
    assert all(a.end == b.start and a.version != b.version for a, b in pairwise(spans))
    assert all(span.kv_version == 1 and span.end > span.start for span in spans)
