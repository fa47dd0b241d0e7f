"""Which of an address and its port is at fault."""

from __future__ import annotations

import pytest

from async_rl.errors import UserError
from async_rl.listening import listen


@pytest.mark.parametrize("host", ["203.0.113.5", "nosuchhost.invalid", "2001:db8::5", "a" * 64, "two words"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(UserError) as caught:
        listen(host, 5, field="weights.host", owner="learner", port_field="weights.relay_port")
    assert str(caught.value).startswith(f"weights.host = {host!r}: cannot listen there (")
    assert str(caught.value).endswith("); write an address of the learner's machine")


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", field="weights.host", owner="learner") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            listen("localhost", port, field="weights.host", owner="learner", port_field="weights.relay_port")
    says = f"weights.relay_port = {port}: cannot listen on localhost (Address already in use); write a free port, or 0"
    assert str(caught.value).startswith(says)
