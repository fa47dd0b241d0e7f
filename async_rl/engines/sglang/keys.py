"""Bearer tokens of SGLang servers, from environment variables that a recipe names: no secret is in a recipe, and none
in the config.json of a run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from async_rl.config import SGLang
from async_rl.errors import UserError


@dataclass(frozen=True, slots=True)
class Keys:
    """Empty: the server asks for none."""

    api: str = field(default="", repr=False)
    """What `--api-key` says: for requests, and to ask how a server is. A router gets it too."""
    admin: str = field(default="", repr=False)
    """What `--admin-api-key` says: for pauses, aborts and weights."""


def keys_of(server: SGLang) -> Keys:
    """Raises UserError: a variable is not set, or holds no key."""
    api = _read("api_key_env", server.api_key_env)
    return Keys(api, _read("admin_api_key_env", server.admin_api_key_env) or api)


def _read(name: str, variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"generator.sglang.{name} = {variable!r}: there is no such environment variable, or it is empty; set it to "
            "the key of the servers, or leave this out"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"generator.sglang.{name} = {variable!r}: what that environment variable holds cannot be a key; set it to "
            "printable ASCII without spaces"
        )
    return key
