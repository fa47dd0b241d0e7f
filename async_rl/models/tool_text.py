"""Pure: conversations with tools, for chat templates: in the form they expect, or in words where they know none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from async_rl.errors import UserError

INSTRUCTIONS = """You can call these functions, one JSON description a line:
{tools}
To call one, write its name and arguments as JSON between tags:
<tool_call>{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}</tool_call>
The results follow between <tool_response> and </tool_response>."""


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As templates take them: content a text, arguments of calls an object, no `developer`.

    Raises:
        UserError: a message is none, or has content that is no text.
    """
    return [_plain(message) for message in messages]


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError: one is not {"type": "function", "function": {"name": ..., "parameters": {JSON schema}}}."""
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(function, Mapping) or not isinstance(cast(Mapping[str, Any], function).get("name"), str):
            raise UserError(
                f'tools: {tool!r} is no tool; write {{"type": "function", "function": {{"name": "NAME", "description": '
                '"WHAT IT DOES", "parameters": {JSON schema of its arguments}}}'
            )


def in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools, calls and results as text of system, assistant and user, in the form that replies are read in."""
    said = [_in_words(message) for message in messages]
    if tools:
        described = "\n".join(json.dumps(tool["function"]) for tool in tools)
        instructions = INSTRUCTIONS.format(tools=described)
        if said and said[0]["role"] == "system":
            said[0]["content"] = f"{said[0]['content']}\n\n{instructions}"
        else:
            said.insert(0, {"role": "system", "content": instructions})
    return said


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise UserError(f'messages: {dict(message)!r} has no role; write {{"role": "user", "content": "..."}}')
    plain = {name: value for name, value in message.items() if value is not None}
    if plain["role"] == "developer":
        plain["role"] = "system"
    plain["content"] = _text(plain.get("content", ""))
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    else:
        plain.pop("tool_calls", None)
    return plain


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = cast(list[Any], content if isinstance(content, list) else [content])
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise UserError(f"messages: content {content!r}: write text; the policy sees neither images nor files")
    return "".join(part["text"] for part in parts)


def _plain_call(call: object) -> dict[str, Any]:
    function = cast(Mapping[str, Any], call).get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise UserError(
            f"messages: tool_calls: {call!r} is no call; write "
            '{"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    plain = dict(cast(Mapping[str, Any], function))
    if isinstance(arguments := plain.get("arguments", {}), str):
        with contextlib.suppress(ValueError):  # else the template gets it as it is
            plain["arguments"] = json.loads(arguments)
    return {**cast(Mapping[str, Any], call), "type": "function", "function": plain}


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    content: str = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [
        "<tool_call>"
        + json.dumps({name: call["function"].get(name) for name in ("name", "arguments")})
        + "</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join([content, *calls] if content else calls) or content}
