"""Plain tables, as TOML and JSON have them, and structs of sections.

Every error is a UserError that names the field, the value and what to write instead.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from typing import Any

import msgspec

from async_rl.errors import UserError

S = typing.TypeVar("S", bound=msgspec.Struct)


def convert(table: dict[str, Any], struct: type[S]) -> S:
    """Plain tables as a struct of sections. Raises UserError naming the field of a wrong type or name."""
    _refuse_unknown(table, struct, "")
    try:
        return msgspec.convert(table, struct)
    except msgspec.ValidationError as error:
        raise UserError(_explain(error, table)) from None


def dumps(run: msgspec.Struct) -> str:
    """The resolved recipe as JSON, every default written out; `from_table(json.loads(...))` reads it back."""
    return json.dumps(msgspec.to_builtins(run), indent=2) + "\n"


def differences(old: msgspec.Struct, new: msgspec.Struct) -> list[str]:
    """Fields in which two recipes differ, as `section.key: old -> new`."""
    flat_old, flat_new = _flatten(msgspec.to_builtins(old)), _flatten(msgspec.to_builtins(new))
    return [
        f"{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(typing.cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override!r}: write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section")
        table = typing.cast(dict[str, Any], inner)
    table[last] = value


def _struct_of(annotation: Any) -> type[msgspec.Struct] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


def _refuse_unknown(table: dict[str, Any], struct: type[msgspec.Struct], prefix: str) -> None:
    known = typing.get_type_hints(struct)
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix + close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{prefix + key} = {value!r}: there is no such field; {hint}")
        inner = _struct_of(known[key])
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(typing.cast(dict[str, Any], value), inner, f"{prefix}{key}.")


def _explain(error: msgspec.ValidationError, table: dict[str, Any]) -> str:
    message, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    value: Any = table
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, dict):
            value = typing.cast(dict[str, Any], value).get(part)
        elif isinstance(value, list) and part.isdigit():
            value = typing.cast(list[Any], value)[int(part)]
    if "missing required field" in message:
        return f"{path or 'the recipe'}: {message[0].lower() + message[1:].replace('`', chr(39))}"
    return f"{path} = {value!r}: {message[0].lower() + message[1:].replace('`', '')}"
