"""examples/calculator.py: what its tool answers, and what an episode is worth; a script plays the model's part."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config import Environment
from async_rl.environments.api import Reward, find, make_tasks
from async_rl.rollout.reply import RecordedReply
from async_rl.simulate.cluster import NumberText
from async_rl.wire.messages import Task

CALCULATOR = find(
    Environment(name="calculator", module=str(Path(__file__).resolve().parents[2] / "examples" / "calculator.py"))
)
MODULE: Any = __import__("calculator")


class Written(NumberText):
    """Tokens are characters."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Script:
    """Says one line after the other, and remembers what it was asked."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.asked = list(lines), list[list[Any]]()

    async def chat(self, messages: Sequence[Any], *, tools: Sequence[Any] = (), **options: Any) -> RecordedReply:
        self.asked.append(list(messages))
        tokens = [ord(character) for character in self.lines.pop(0)]
        call = len(self.asked) - 1
        return RecordedReply(Written(), tokens, [0.0] * len(tokens), "eos", call, 1, False, bool(tools), ())


def call(expression: str, name: str = "calculate") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {{"expression": "{expression}"}}}}</tool_call>'


@pytest.mark.parametrize(
    ("lines", "value", "exact"),
    [
        ((call("60 * 64"), "60 * 64 = 3,840"), 1.0, 1.0),
        (("It is 3840.",), 0.9, 1.0),
        ((call("60 * 64"), "3841"), 0.1, 0.0),
        ((call("60 ** 64"), "no idea"), 0.0, 0.0),
        ((call("60 * 64", name="add"), call("60 * 64"), "3840"), 1.0, 1.0),
        ((call("60"), call("60"), call("60"), call("60*64")), 0.1, 0.0),
        (('<tool_call>{"name": 3840}</tool_call>',), 0.9, 1.0),
    ],
)
def test_what_an_episode_is_worth(real: Any, lines: tuple[str, ...], value: float, exact: float) -> None:
    script: Any = Script(*lines)
    task = Task("t", {"question": "What is 60 * 64?", "answer": 3840})
    reward: Any = real(CALCULATOR.episode(task, script))
    assert isinstance(reward, Reward) and reward.value == pytest.approx(value) and reward.metrics == {"exact": exact}
    assert sum(reward.parts.values()) == pytest.approx(value)
    for before, after in zip(script.asked, script.asked[1:], strict=False):
        assert after[: len(before)] == before and [m["role"] for m in after[len(before) :]] == ["assistant", "tool"]


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(MODULE).failed == 0


@given(st.text(alphabet="0123456789.+-*/() eE_x\n", max_size=70))
def test_the_tool_answers_whatever_it_is_asked(expression: str) -> None:
    assert isinstance(MODULE.calculate(expression), str)


def test_held_out_questions_are_not_trained_on() -> None:
    source = make_tasks(CALCULATOR, {"questions": 60, "heldout": 20}, seed=3)
    held_out = {row["question"] for row in source.heldout()}
    assert len(held_out) == 20 and held_out.isdisjoint(source.train(index)["question"] for index in range(200))
