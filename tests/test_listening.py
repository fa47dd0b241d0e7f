"""Which of an address and its port is at fault."""

from __future__ import annotations

import socket

import pytest

from async_rl.errors import UserError
from async_rl.listening import is_loopback, listen, numeric


@pytest.mark.parametrize("host", ["203.0.113.5", "nosuchhost.invalid", "2001:db8::5", "a" * 64, "two words"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(UserError) as caught:
        listen(host, 5, field="weights.host", owner="learner", port_field="weights.relay_port")
    assert str(caught.value).startswith(f"weights.host = {host!r}: cannot listen there (")
    assert str(caught.value).endswith("); write an address of the learner's machine")


def test_a_name_that_only_this_machine_knows_itself_by_is_no_address_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian writes `127.0.1.1 <host name>` into /etc/hosts."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    for look in (numeric, listen):
        with pytest.raises(UserError, match=r"host = 'node7': on this machine it means 127.0.1.1, which no other"):
            look("node7", field="controller.host", owner="controller")
    assert numeric("localhost", field="controller.host", owner="controller") == "127.0.1.1", "it promises nothing else"


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("node7", False),
    ],
)
def test_what_is_loopback(host: str, says: bool) -> None:
    assert is_loopback(host) is says


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", field="weights.host", owner="learner") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            listen("localhost", port, field="weights.host", owner="learner", port_field="weights.relay_port")
    says = f"weights.relay_port = {port}: cannot listen on localhost (Address already in use); write a free port, or 0"
    assert str(caught.value).startswith(says)
