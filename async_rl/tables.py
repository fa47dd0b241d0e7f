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
from typing import Any, Literal

import msgspec

from async_rl.errors import UserError

S = typing.TypeVar("S", bound=msgspec.Struct)
SOME_KEY = "..."
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+|\.\.\.)\]")
"""Of msgspec's path to a value: a field, a place in an array, or `...`: some key of a table, it does not say which."""


def convert(table: dict[str, Any], struct: type[S]) -> S:
    """Plain tables as a struct of sections. Raises UserError naming the field of a wrong type or name."""
    _refuse_unknown(table, struct, "")
    try:
        return msgspec.convert(table, struct)
    except msgspec.ValidationError as error:
        raise UserError(_explain(error, table, struct)) from None


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
    return next((o for o in _members(annotation) if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


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


def _explain(error: msgspec.ValidationError, table: dict[str, Any], struct: type[msgspec.Struct]) -> str:
    message, _, path = str(error).partition(" - at `")
    message = message[0].lower() + message[1:]
    path, value, annotation = _follow(path.removeprefix("key` in `").rstrip("`").removeprefix("$"), table, struct)
    if "missing required field" in message:
        return f"{path or 'the recipe'}: {message.replace('`', chr(39))}"
    choices = [str(one) for literal in _members(annotation, Literal) for one in typing.get_args(literal)]
    if choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{path} = {value!r}: write {' or '.join([', '.join(choices[:-1]), choices[-1]])}{hint}"
    hint = ""
    if message.startswith("expected `str`"):
        hint = "; write it in quotes"
    elif message == "expected `array`, got `str`":
        hint = f"; write [{value!r}]"
    return f"{path} = {value!r}: {message.replace('`', '')}{hint}"


def _follow(path: str, value: Any, annotation: Any) -> tuple[str, Any, Any]:
    """Along msgspec's path: as a recipe writes it, the value there, and what it may be."""
    written = ""
    for field, place in STEP.findall(path):
        if field:
            struct = _struct_of(annotation)
            assert struct is not None, "only structs have fields"
            annotation = typing.get_type_hints(struct)[field]
            value, written = value[field], f"{written}.{field}" if written else field
        elif place == SOME_KEY:
            (table,) = _members(annotation, dict)
            annotation = typing.get_args(table)[1]
            key = next(key for key in value if not _fits(value[key], annotation))
            value, written = value[key], f"{written}.{key}"
        else:
            (array,) = _members(annotation, list) + _members(annotation, tuple)
            elements = typing.get_args(array)
            annotation = elements[min(int(place), len(elements) - 1)]
            value, written = value[int(place)], f"{written}[{place}]"
    return written, value, annotation


def _members(annotation: Any, origin: Any = None) -> list[Any]:
    """Of a union, those of this origin; a type is a union of itself."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [one for one in members if origin is None or typing.get_origin(one) is origin]


def _fits(value: Any, annotation: Any) -> bool:
    try:
        msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        return False
    return True
