"""Files of JSON lines: every row typed and checked, a wrong one named with its file, line, field and value.

    rows = read(Path("pairs.jsonl"), preference_row)

Fields that a row has besides those it is read for (an id, a source) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import msgspec

from async_rl.errors import UserError

R = TypeVar("R")
S = TypeVar("S", bound=msgspec.Struct)


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


Prompt = str | list[Message]
"""A text, or the messages before the response."""


class Wrong(Exception):
    """A row that is not as it should be: field, value, what to write instead."""


@dataclass(frozen=True, slots=True)
class Row(Generic[R]):
    """Where it stands, and what it is."""

    file: Path
    line: int
    """From 1."""
    value: R

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


def read(path: Path, parse: Callable[[dict[str, Any]], R]) -> list[Row[R]]:
    """Every row of a file; blank lines are skipped.

    Raises:
        UserError: the file cannot be read or is empty, or a line is wrong: its number, the field, the value and what
            to write.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    found: list[Row[R]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(Row(path, number, parse(_object(line))))
        except Wrong as wrong:
            raise UserError(f"{path}, line {number}: {wrong}") from None
    if not found:
        raise UserError(f"{path}: it has no rows; write one JSON object a line")
    return found


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Wrong(f"{short(line.decode(errors='replace'))}: it is not JSON ({error}); write one object") from None
    if not isinstance(row, dict):
        raise Wrong(f"{short(row)}: it is no object; write {{...}} with named fields")
    return cast(dict[str, Any], row)


def convert(row: dict[str, Any], struct: type[S]) -> S:
    """Raises Wrong, naming the field."""
    try:
        return msgspec.convert(row, struct)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        if "missing required field" in message:
            missing = message.rpartition(" ")[2].strip("`")
            where = f"{field}.{missing}" if field else missing
            raise Wrong(f"{where} is missing (fields: {', '.join(row)}); write it") from None
        value: Any = row.get(field.partition("[")[0].partition(".")[0])
        lowered = message[0].lower() + message[1:].replace("`", "")
        raise Wrong(f"{field} = {short(value)}: {lowered}") from None


def check_prompt(prompt: Prompt) -> None:
    """Raises Wrong: there is nothing to answer."""
    if isinstance(prompt, str):
        filled("prompt", prompt)
    elif not prompt:
        raise Wrong("prompt = []: write a text, or at least one message")
    elif prompt[-1].role == "assistant":
        raise Wrong("prompt: its last message is of the assistant; the response comes after the user's or a tool's")


def filled(field: str, text: str) -> None:
    """Raises Wrong: the text is empty."""
    if not text:
        raise Wrong(f"{field} = '': write a text")


def short(value: object, limit: int = 80) -> str:
    """As JSON, on a line of an error."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
