"""Keys come from the environment, and go nowhere else (tests/sglang has a server that asks for them)."""

from __future__ import annotations

import pytest

from async_rl.config import SGLang
from async_rl.engines.sglang.keys import Keys, keys_of
from async_rl.errors import UserError


def test_keys_are_read_from_the_variables_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", " one\n")
    monkeypatch.setenv("ADMIN", "two")
    assert keys_of(SGLang()) == Keys()
    assert keys_of(SGLang(api_key_env="KEY")) == Keys("one", "one")
    found = keys_of(SGLang(api_key_env="KEY", admin_api_key_env="ADMIN"))
    assert found == Keys("one", "two") and "one" not in repr(found) and "two" not in repr(found)
    assert keys_of(SGLang(admin_api_key_env="ADMIN")) == Keys("", "two")


@pytest.mark.parametrize("field", ["api_key_env", "admin_api_key_env"])
def test_a_variable_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.delenv("KEY", raising=False)
    for value, says in [(None, "there is no such"), ("  ", "there is no such"), ("a b", "cannot be a key")]:
        if value is not None:
            monkeypatch.setenv("KEY", value)
        with pytest.raises(UserError, match=f"generator.sglang.{field} = 'KEY': .*{says}") as caught:
            keys_of(SGLang(**{field: "KEY"}))
        assert "a b" not in str(caught.value)
