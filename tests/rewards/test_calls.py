"""Values between a test and a program, and what a program may answer instead."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.rewards.inside.calls import Gone, OutOfTime, Peer, Remote, Unsupported
from async_rl.rewards.inside.channel import pack

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 300, max_value=1 << 301)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=3,
)
plain = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.sets(hashable, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=5,
)


class Library:
    """The program's end, in a thread."""

    def __init__(self, **names: Any) -> None:
        ours, theirs = socket.socketpair()
        self._ours, self._theirs = ours, theirs
        self._thread = threading.Thread(target=Peer(theirs, lambda: names).serve)
        self._thread.start()
        self.peer = Peer(ours)
        self.peer.deadline = time.monotonic() + 60
        self.names = self.peer.request("load")

    def close(self) -> None:
        self._ours.close()
        self._thread.join()
        self._theirs.close()


@pytest.fixture(scope="module")
def library() -> Any:
    made = Library(same=lambda x: x, kind=lambda x: type(x).__name__, late=lambda: time.sleep(0))
    yield made
    made.close()


def alike(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, (list, tuple)):
        return all(map(alike, one, other))
    if isinstance(one, dict):
        return all(alike(one[key], other[key]) for key in one)
    return True


@settings(max_examples=30)
@given(value=plain)
def test_plain_values_come_back_as_they_went(library: Library, value: Any) -> None:
    assert alike(library.names["same"](value), value)
    assert library.names["kind"](value) == type(value).__name__


def test_what_is_not_plain_is_not_passed(library: Library) -> None:
    with pytest.raises(Unsupported, match="passes a object"):
        library.names["same"](object())
    function = library.names["same"]
    assert isinstance(function, Remote) and function != 1 and function == library.names["same"]
    with pytest.raises(TypeError):
        function + 1
    assert math.isnan(library.names["same"](math.nan))


messages = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=3)
        | st.sampled_from(["=", "!", "?", "mine", "call"]),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    ).map(lambda value: pack(value)),
    st.lists(st.integers(-3, 3) | st.sampled_from(["list", "dict", "set", "mine", "yours", "int", "exception"])).map(
        lambda parts: pack(["=", parts])
    ),
)


@given(frames=st.lists(messages, max_size=3))
def test_whatever_a_program_answers_a_test_gets_a_value_or_an_error(frames: list[bytes]) -> None:
    """And never waits for ever: the deadline of the test holds."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(frames))
        theirs.shutdown(socket.SHUT_WR)
        peer = Peer(ours)
        peer.deadline = time.monotonic() + 60
        with contextlib.suppress(Gone, Exception):
            peer.request("call", [], {})
        assert not isinstance(peer.broken, OutOfTime)


def test_no_answer_is_waited_for_longer_than_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = Peer(ours)
        peer.deadline = time.monotonic()
        with pytest.raises(OutOfTime):
            peer.request("load")
        peer.deadline = time.monotonic() + 60
        with pytest.raises(OutOfTime):  # once broken, always: a test may have swallowed it
            peer.request("load")


def test_numbers_of_every_kind_are_numbers(library: Library) -> None:
    for value in (Fraction(1, 3), Decimal("1.10"), -(1 << 62), 1 << 62, True, -0.0):
        assert alike(library.names["same"](value), value)
