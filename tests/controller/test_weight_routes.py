"""Who gets the weights how: joining, silence, groups that fail, members that never come."""

from __future__ import annotations

import pytest

from async_rl.controller.generators import Peer
from async_rl.controller.weight_routes import REPEATS, WeightRoutes
from async_rl.wire.messages import Transport, WeightsAnnounce, WeightsId

HERE, THERE = "boot/1", "boot/2"


def v(version: int) -> WeightsId:
    return WeightsId(1, version)


def peer(name: str, machine: str = THERE, weights: int | None = None) -> Peer:
    return Peer(name, name, machine, 0.0, weights=None if weights is None else v(weights))


def file(version: int, transport: Transport = "http") -> WeightsAnnounce:
    return WeightsAnnounce(v(version), transport)


def routes(transport: str = "process_group") -> WeightRoutes:
    made = WeightRoutes(transport)
    made.learner("host:1", HERE)
    return made


def grouped(*peers: Peer) -> WeightRoutes:
    made = routes()
    group = made.regroup(peers)
    assert group is not None and group.members == [one.name for one in peers]
    return made


@pytest.mark.parametrize("transport", ["shared_memory", "http"])
def test_one_transport_for_all(transport: Transport) -> None:
    made, a = routes(transport), peer("a")
    assert made.transport(a) == transport and made.joined(a) is None
    assert made.announced(file(1, transport), [a]) == [a]
    assert made.joined(peer("b")) == file(1, transport)
    assert made.regroup([a]) is None and not made.grouped


def test_auto_looks_at_the_machine() -> None:
    made, near, far = routes("auto"), peer("near", HERE), peer("far")
    group = made.regroup([near, far])
    assert group is not None and group.members == ["far"] and group.store == "host:1"
    assert made.announced(file(1, "shared_memory"), [near, far]) == [near]
    assert made.announced(file(1, "process_group"), [near, far]) == [far]
    assert made.announced(file(1, "http"), [near, far]) == []
    assert made.joined(peer("second", HERE)) == file(1, "shared_memory")
    assert made.joined(peer("third")) == file(1, "http")


def test_auto_without_a_store_is_shared_memory() -> None:
    made = WeightRoutes("auto")
    made.learner("", HERE)
    assert made.transport(peer("a")) == "shared_memory" and made.regroup([peer("a")]) is None


def test_a_newcomer_fetches_a_file_and_is_in_the_next_group() -> None:
    a, b = peer("a", weights=3), peer("b")
    made = grouped(a)
    made.announced(file(3), [a])
    assert made.joined(b) == file(3)
    assert made.announced(file(4, "process_group"), [a, b]) == [a]
    group = made.regroup([a, b])
    assert group is not None and (group.epoch, group.members) == (2, ["a", "b"])
    assert made.announced(file(5, "process_group"), [a, b]) == [a, b]
    assert made.announced(file(5), [a, b]) == []


def test_a_silent_member_leaves_the_group_fetches_what_it_missed_and_comes_back() -> None:
    a, b = peer("a", weights=1), peer("b", weights=1)
    made = grouped(a, b)
    b.silent = True
    made.silence(b)
    group = made.regroup([a, b])
    assert group is not None and group.members == ["a"]
    made.announced(file(2), [a, b])
    assert made.catch_up([a, b]) == [], "nobody hears while it is silent"
    b.silent = False
    made.silence(b)
    assert (group := made.regroup([a, b])) is not None and group.members == ["a"], "it has to catch up first"
    assert made.catch_up([a, b]) == [(b, file(2))]
    b.weights = v(2)
    assert made.live(b)
    assert (group := made.regroup([a, b])) is not None and group.members == ["a", "b"]


def test_a_short_silence_without_news_needs_no_catching_up() -> None:
    a, b = peer("a", weights=1), peer("b", weights=1)
    made = grouped(a, b)
    made.announced(file(1), [a, b])
    for b.silent in (True, False):
        made.silence(b)
    assert (group := made.regroup([a, b])) is not None and group.members == ["a", "b"]


def test_who_never_comes_to_a_group_stays_with_http() -> None:
    a, b = peer("a", weights=0), peer("b", weights=0)
    made = grouped(a, b)
    for version in range(1, REPEATS + 1):
        made.group_failed(["b"])
        assert (group := made.regroup([a, b])) is not None and group.members == ["a"]
        made.announced(file(version), [a, b])
        b.weights = v(version)
        assert made.live(b) == (version < REPEATS)
        group = made.regroup([a, b])
        assert group is not None and group.members == (["a", "b"] if version < REPEATS else ["a"])
    assert made.announced(file(9), [a, b]) == [b]
    made.joined(b)  # a new process: perhaps it can now
    assert (group := made.regroup([a, b])) is not None and group.members == ["a", "b"]


def test_a_group_that_fails_again_and_again_for_no_known_reason_is_given_up() -> None:
    a, b = peer("a", weights=0), peer("b", weights=0)
    made = grouped(a, b)
    for _ in range(REPEATS - 1):
        made.group_failed([])
        assert (group := made.regroup([a, b])) is not None and group.members == ["a", "b"]
    made.group_failed([])
    assert (group := made.regroup([a, b])) is not None and group.members == []
    assert made.announced(file(1), [a, b]) == [a, b]


def test_one_success_in_between_and_the_group_is_not_given_up() -> None:
    a = peer("a", weights=0)
    made = grouped(a)
    for _ in range(3 * REPEATS):
        made.group_failed([])
        made.live(a)
        assert (group := made.regroup([a])) is not None and group.members == ["a"]


def test_a_broadcast_that_broke_off_is_made_good_by_the_file() -> None:
    a, b = peer("a", weights=1), peer("b", weights=1)
    made = grouped(a, b)
    made.announced(file(2, "process_group"), [a, b])
    assert made.failed(a, v(2)) is None, "the file of version 2 is not there yet"
    assert made.announced(file(2), [a, b]) == [a]
    assert made.announced(file(3), [a, b]) == [], "once"
    assert made.failed(b, v(3)) == file(3), "it is there already"


def test_what_cannot_be_taken_is_tried_a_few_times() -> None:
    made, a = routes("http"), peer("a")
    made.announced(file(1), [a])
    assert [made.failed(a, v(1)) for _ in range(REPEATS + 2)] == [file(1)] * REPEATS + [None, None]
    made.announced(file(2), [a])
    assert made.failed(a, v(2)) == file(2), "newer ones are another matter"


def test_a_new_learner_has_announced_nothing_yet() -> None:
    made, a = routes("http"), peer("a")
    made.announced(file(7), [a])
    made.learner("host:2", HERE)
    assert made.joined(a) is None and made.failed(a, v(7)) is None
