"""What replies say: thoughts, content, calls of tools; and that nothing a model writes makes reading it fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.rollout.replies import Called, Said, read_reply

ADD = '{"name": "add", "arguments": {"a": 1, "b": [2]}}'
CALL = Called("add", {"a": 1, "b": [2]})


def read(text: str, *, thinks: bool = False, opened: bool = False, tools: bool = True) -> Said:
    return read_reply(text, thinks=thinks, opened=opened, tools=tools)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"<tool_call>\n{ADD}\n</tool_call>", Said("", None, [CALL])),
        (f"So:\n<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>", Said("So:", None, [CALL, CALL])),
        (
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
            Said("", None, [Called("add", {"a": 1})]),
        ),
        (ADD.replace("arguments", "parameters"), Said("", None, [CALL])),
        (f" {ADD}; {ADD}\n", Said("", None, [CALL, CALL])),
        # what is no call stays text
        ("<tool_call>{'name': 'add'}</tool_call>", Said("<tool_call>{'name': 'add'}</tool_call>")),
        ('<tool_call>{"name": "add"}</tool_call>', Said('<tool_call>{"name": "add"}</tool_call>')),
        (f"<tool_call>{ADD}", Said(f"<tool_call>{ADD}")),
        (f"<tool_call>{ADD}</tool_call><tool_call>[]</tool_call>", Said("<tool_call>[]</tool_call>", None, [CALL])),
        (f"{ADD} is the call", Said(f"{ADD} is the call")),
        ('{"answer": 3}', Said('{"answer": 3}')),
        ("", Said("")),
    ],
)
def test_calls_of_tools(text: str, said: Said) -> None:
    assert read(text) == said
    assert read(text, tools=False) == Said(text)


@pytest.mark.parametrize(
    ("text", "opened", "said"),
    [
        ("<think>\nhm\n</think>\n\nfour", False, Said("four", "hm")),
        ("<think>\n\n</think>\n\nfour", False, Said("four", "")),
        ("hm</think>four", True, Said("four", "hm")),
        ("hm</think>four", False, Said("four", "hm")),  # some templates begin it and do not end on it
        ("<think>hm", False, Said("", "hm")),
        ("hm", True, Said("", "hm")),
        ("four", False, Said("four")),
        ("four <think>", False, Said("four <think>")),
        (f"<think>{ADD}</think><tool_call>{ADD}</tool_call>", False, Said("", ADD, [CALL])),
    ],
)
def test_thoughts(text: str, opened: bool, said: Said) -> None:
    assert read(text, thinks=True, opened=opened) == said
    assert read(text, tools=False).content == text, "a template that knows no thoughts"


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        ADD,
        "{",
        "}",
        '"',
        ";",
        "[" * 3000,
        "NaN",
        '{"name": 1}',
        " ",
    ]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=8).map("".join), st.booleans(), st.booleans())
def test_whatever_a_model_writes_is_read(text: str, thinks: bool, opened: bool) -> None:
    said = read(text, thinks=thinks, opened=opened)
    assert all(isinstance(call.name, str) for call in said.calls)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(max_size=5), st.none() | st.lists(st.integers() | st.text(max_size=5), max_size=2), max_size=3
    )
)
def test_what_is_written_is_what_is_read(arguments: dict[str, Any]) -> None:
    for key in ("arguments", "parameters"):
        assert read(json.dumps({"name": "f", key: arguments})).calls == [Called("f", arguments)]
    (call,) = read(f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>").calls
    assert call == Called("f", arguments)
