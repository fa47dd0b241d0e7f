"""Pure: the rows of a data file, one JSON object a line, typed and checked: a wrong one is named with its line.

    rows = read(Path("pairs.jsonl"), preference_row)

Fields that a row has besides those named here (an id, a source) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import msgspec

from async_rl.errors import UserError


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


Prompt = str | list[Message]
"""A text, or the messages before the response."""


class PromptResponse(msgspec.Struct, frozen=True):
    """SFT, distillation, reference answers of a reward model."""

    prompt: Prompt
    response: str


class Conversation(msgspec.Struct, frozen=True):
    """SFT."""

    messages: list[Message]


class Text(msgspec.Struct, frozen=True):
    """SFT on plain text: every token of it is trained on."""

    text: str


class Pair(msgspec.Struct, frozen=True):
    """Preference, reward model."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    """Reward model only: by how much the scores should differ."""


class Ranked(msgspec.Struct, frozen=True):
    """Reward model: K answers of one prompt."""

    prompt: Prompt
    responses: list[str]
    ranking: list[int]
    """Numbers of the responses, from 0, best first."""


class OnlyPrompt(msgspec.Struct, frozen=True):
    """Distillation, where the responses are sampled."""

    prompt: Prompt


SFTRow = PromptResponse | Conversation | Text
RewardRow = Pair | Ranked
R = TypeVar("R")
S = TypeVar("S", bound=msgspec.Struct)


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


def sft_row(row: dict[str, Any]) -> SFTRow:
    """{"prompt", "response"}, {"messages"} or {"text"}."""
    if "messages" in row:
        conversation = _convert(row, Conversation)
        roles = [message.role for message in conversation.messages]
        if "assistant" not in roles:
            raise Wrong(f"messages = {_short(roles)}: none is of the assistant; there is nothing to train on")
        if roles[-1] != "assistant":
            raise Wrong(f"messages = {_short(roles)}: the last one is of the {roles[-1]}; write the reply after it")
        return conversation
    if "text" in row:
        text = _convert(row, Text)
        _filled("text", text.text)
        return text
    if "prompt" not in row and "response" not in row:
        known = _short(sorted(row))
        raise Wrong(f"fields = {known}: write prompt and response, or messages, or text")
    return prompt_response_row(row)


def prompt_response_row(row: dict[str, Any]) -> PromptResponse:
    """{"prompt", "response"}"""
    found = _convert(row, PromptResponse)
    _check_prompt(found.prompt)
    _filled("response", found.response)
    return found


def preference_row(row: dict[str, Any]) -> Pair:
    """{"prompt", "chosen", "rejected"}"""
    pair = _convert(row, Pair)
    _check_prompt(pair.prompt)
    _filled("chosen", pair.chosen)
    _filled("rejected", pair.rejected)
    if pair.chosen == pair.rejected:
        raise Wrong(f"rejected = {_short(pair.rejected)}: it equals chosen; leave the row out")
    if pair.margin < 0:
        raise Wrong(f"margin = {pair.margin}: write 0 or more, or exchange chosen and rejected")
    return pair


def reward_row(row: dict[str, Any]) -> RewardRow:
    """A pair, or {"prompt", "responses", "ranking"}"""
    if "responses" not in row:
        return preference_row(row)
    ranked = _convert(row, Ranked)
    _check_prompt(ranked.prompt)
    count = len(ranked.responses)
    if count < 2:
        raise Wrong(f"responses = {_short(ranked.responses)}: write at least two")
    for number, response in enumerate(ranked.responses):
        _filled(f"responses[{number}]", response)
    if sorted(ranked.ranking) != list(range(count)):
        raise Wrong(f"ranking = {ranked.ranking}: write each number from 0 to {count - 1} once, best first")
    return ranked


def prompt_row(row: dict[str, Any]) -> OnlyPrompt:
    """{"prompt"}"""
    found = _convert(row, OnlyPrompt)
    _check_prompt(found.prompt)
    return found


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Wrong(f"{_short(line.decode(errors='replace'))}: it is not JSON ({error}); write one object") from None
    if not isinstance(row, dict):
        raise Wrong(f"{_short(row)}: it is no object; write {{...}} with named fields")
    return cast(dict[str, Any], row)


def _convert(row: dict[str, Any], struct: type[S]) -> S:
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
        raise Wrong(f"{field} = {_short(value)}: {lowered}") from None


def _check_prompt(prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _filled("prompt", prompt)
    elif not prompt:
        raise Wrong("prompt = []: write a text, or at least one message")
    elif prompt[-1].role == "assistant":
        raise Wrong("prompt: its last message is of the assistant; the response comes after the user's or a tool's")


def _filled(field: str, text: str) -> None:
    if not text:
        raise Wrong(f"{field} = '': write a text")


def _short(value: object, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."
