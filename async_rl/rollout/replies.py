"""Pure: what a reply says: thoughts, content, calls of tools.

    <think>...</think>                                                    thoughts (Qwen 3, DeepSeek R1)
    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>         a call (Hermes, Qwen 2.5 and 3)
    {"name": "add", "parameters": {"a": 1}}                               a call, if that is the whole reply (Llama 3)

What is no call of this form stays in the content: a model that is being trained writes many a broken one, and what that
is worth is for the environment to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

THINK, END_OF_THINKING = "<think>", "</think>"
HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool, as it was written."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    content: str
    reasoning: str | None = None
    """None: there are no thoughts in the reply."""
    calls: list[Called] = field(default_factory=list[Called])


def read_reply(text: str, *, thinks: bool, opened: bool, tools: bool) -> Said:
    """
    Args:
        thinks: the model's template knows thoughts.
        opened: the prompt ended with <think>, so that the reply begins among thoughts.
        tools: calls of tools are looked for.

    >>> read_reply("<think>2+2</think>4", thinks=True, opened=False, tools=False)
    Said(content='4', reasoning='2+2', calls=[])
    >>> read_reply('<tool_call>{"name": "f", "arguments": {}}</tool_call>', thinks=False, opened=False, tools=True)
    Said(content='', reasoning=None, calls=[Called(name='f', arguments={})])
    """
    reasoning: str | None = None
    if thinks:
        head, closed, rest = text.partition(END_OF_THINKING)
        before, _, inside = head.rpartition(THINK) if THINK in head else ("", "", head)
        if closed or opened or (THINK in head and not before.strip()):
            reasoning, text = inside.strip(), rest.lstrip()
    if not tools:
        return Said(text, reasoning)
    content, calls = _hermes(text)
    if not calls and (llama := _llama(text)):
        content, calls = "", llama
    return Said(content, reasoning, calls)


def _hermes(text: str) -> tuple[str, list[Called]]:
    """The text without its calls, and the calls."""
    calls: list[Called] = []

    def take(match: re.Match[str]) -> str:
        call = _call(_json(match[1]), "arguments")
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = HERMES.sub(take, text)
    return (content.strip(), calls) if calls else (text, [])


def _llama(text: str) -> list[Called]:
    """Calls that are the whole of the text, several with a semicolon between them; else none."""
    decoder, at, calls = json.JSONDecoder(), 0, list[Called]()
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = _call(value, "parameters") or _call(value, "arguments")
        if call is None:
            return []
        calls.append(call)
        rest = text[at:].lstrip()
        if rest and not rest.startswith(";"):
            return []
        at = len(text) - len(rest[1:].lstrip())
    return calls


def _call(value: object, arguments: str) -> Called | None:
    if not isinstance(value, dict):
        return None
    record = cast(dict[str, Any], value)
    name, given = record.get("name"), record.get(arguments)
    if isinstance(given, str):
        given = _json(given)
    return Called(name, cast(dict[str, Any], given)) if isinstance(name, str) and isinstance(given, dict) else None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
