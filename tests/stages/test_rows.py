"""Data files: what is read, and what is said about a wrong line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_rl.errors import UserError
from async_rl.json_lines import Message, read
from async_rl.stages import rows
from async_rl.stages.rows import Conversation, Pair, PromptResponse, Ranked, Text

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD: list[tuple[Callable[[dict[str, Any]], Any], dict[str, Any], Any]] = [
    (rows.sft_row, {"prompt": "a", "response": "b", "id": 7}, PromptResponse("a", "b")),
    (rows.sft_row, {"messages": CHAT}, Conversation([Message("user", "a"), Message("assistant", "b")])),
    (rows.sft_row, {"text": "ab"}, Text("ab")),
    (rows.preference_row, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, Pair("a", "b", "c", 1.0)),
    (rows.reward_row, {"prompt": "a", "chosen": "b", "rejected": "c"}, Pair("a", "b", "c")),
    (rows.reward_row, {"prompt": "a", "responses": ["b", "c"], "ranking": [1, 0]}, Ranked("a", ["b", "c"], [1, 0])),
    (rows.prompt_row, {"prompt": [CHAT[0]], "response": "x"}, rows.OnlyPrompt([Message("user", "a")])),
]
BAD: list[tuple[Callable[[dict[str, Any]], Any], str, str]] = [
    (rows.sft_row, "{", "it is not JSON"),
    (rows.sft_row, "[1]", "[1]: it is no object; write {...} with named fields"),
    (rows.sft_row, '{"question": "a"}', 'fields = ["question"]: write prompt and response, or messages, or text'),
    (rows.sft_row, '{"prompt": "a"}', "response is missing (fields: prompt); write it"),
    (rows.sft_row, '{"prompt": "a", "response": 5}', "response = 5: expected str, got int"),
    (rows.sft_row, '{"prompt": "a", "response": ""}', "response = '': write a text"),
    (rows.sft_row, '{"prompt": [], "response": "b"}', "prompt = []: write a text, or at least one message"),
    (rows.sft_row, '{"messages": [{"role": "robot", "content": "a"}]}', "messages[0].role = "),
    (rows.sft_row, '{"messages": [{"role": "user"}]}', "messages[0].content is missing"),
    (rows.sft_row, '{"messages": [{"role": "user", "content": "a"}]}', "none is of the assistant"),
    (rows.preference_row, '{"prompt": "a", "chosen": "b", "rejected": "b"}', 'rejected = "b": it equals chosen'),
    (rows.preference_row, '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}', "margin = -1.0: write 0"),
    (rows.reward_row, '{"prompt": "a", "responses": ["b"], "ranking": [0]}', "write at least two"),
    (rows.reward_row, '{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 1]}', "ranking = [1, 1]: write each"),
    (rows.prompt_row, '{"prompt": [{"role": "assistant", "content": "a"}]}', "its last message is of the assistant"),
]


@pytest.mark.parametrize(("parse", "row", "found"), GOOD)
def test_rows(tmp_path: Path, parse: Any, row: dict[str, Any], found: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    (one,) = read(file, parse)
    assert one.value == found and str(one) == f"{file}, line 2"


@pytest.mark.parametrize(("parse", "line", "says"), BAD)
def test_a_wrong_line_is_named(tmp_path: Path, parse: Any, line: str, says: str) -> None:
    good = {rows.sft_row: GOOD[0], rows.preference_row: GOOD[3], rows.reward_row: GOOD[4]}.get(parse, GOOD[6])[1]
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{line}\n{json.dumps(good)}\n")
    with pytest.raises(UserError) as raised:
        read(file, parse)
    assert str(raised.value).startswith(f"{file}, line 3: ") and says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 1: .*it is not JSON"):
        read(file, rows.sft_row)


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: it has no rows; write one JSON object a line"):
        read(tmp_path / "empty.jsonl", rows.sft_row)
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        read(tmp_path / "none.jsonl", rows.sft_row)
