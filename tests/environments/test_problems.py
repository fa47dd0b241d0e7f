"""Problems from files: what is asked, what it earns, and what is said about a wrong line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from async_rl import config, recipes, rewards
from async_rl.environments.api import Message, Reward, find, make_tasks
from async_rl.errors import UserError
from async_rl.tasks.source import TaskSource, heldout_tasks, train_task
from async_rl.wire.messages import Task

MATH = [{"prompt": f"Half of {n}?", "answer": f"{n}/2", "id": n} for n in range(1, 11)]
CODE = [
    {"prompt": "Write add(a, b).", "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
    {"prompt": "Print the sum of two numbers.", "tests": [{"input": "1 2", "output": "3"}]},
]


class Says:
    """A policy that gives one reply and remembers what it was asked."""

    def __init__(self, text: str, num_tokens: int = 3) -> None:
        self.text, self.tokens, self.finish_reason = text, tuple(range(num_tokens)), "eos"
        self.asked: list[Message] = []

    async def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None) -> Says:
        self.asked = list(messages)
        return self


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writes(rows: Sequence[Any], name: str = "problems.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return writes


def tasks(name: str, **options: Any) -> TaskSource:
    return make_tasks(find(config.Environment(name=name)), options, 1)


def episode(name: str, task: Task, policy: Says) -> Reward:
    return Reward.of(asyncio.run(find(config.Environment(name=name)).episode(task, policy)))


def test_a_problem_is_asked_under_its_template_and_graded(write: Any) -> None:
    source = tasks("math", data=write(MATH), template="{prompt} Use \\boxed{}.", system="Be brief.", heldout=2)
    task = train_task(source, 0)
    (right,) = task["answer"]
    policy = Says(rf"It is \boxed{{\frac{{{right[:-2]}}}{{2}}}}.")
    reward = episode("math", task, policy)
    assert reward == Reward(1.0, {"accuracy": 1.0}, {"exact": 1.0, "answered": 1.0})
    system, user = policy.asked
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].startswith("Half of ") and user["content"].endswith(r"? Use \boxed{}.")
    assert episode("math", task, Says("I do not know")).metrics == {"exact": 0.0, "answered": 0.0}


def test_held_out_problems_are_never_trained_on(write: Any) -> None:
    source = tasks("math", data=write(MATH), heldout=3)
    held = [task["answer"] for task in heldout_tasks(source, 10)]
    trained = [train_task(source, i)["answer"] for i in range(14)]
    assert len(held) == 3 and not [answer for answer in trained if answer in held]
    assert trained[:7] != trained[7:] and sorted(trained[:7]) == sorted(trained[7:])
    other = tasks("math", data=write(MATH[:5], "a.jsonl"), heldout_data=write(MATH[5:], "b.jsonl"))
    assert [task["answer"] for task in heldout_tasks(other, 10)] == [[row["answer"]] for row in MATH[5:]]


def test_what_the_reward_is_made_of_is_in_the_recipe(write: Any) -> None:
    options = {"format": "boxed", "language": "en", "overlong": [10, 20], "repetition": True, "combine": "gated"}
    source = tasks("math", data=write(MATH), symbolic=False, weights={"language": 0.5}, **options)
    task = train_task(source, 0)
    (right,) = task["answer"]
    well = episode("math", task, Says(rf"Well, \boxed{{{right}}}", 15))
    assert well.value == pytest.approx(1 + 0.5 - 0.5) and well.metrics["format"] == 1.0
    badly = episode("math", task, Says(f"Ну, {right}", 15))
    assert badly.value == pytest.approx(-0.5) and badly.metrics["exact"] == 1.0


def test_answers_inside_solutions_under_other_names(write: Any) -> None:
    rows = [{"question": "6 * 12?", "solution": "6 * 12 is 72.\n#### 72"}]
    source = tasks("math", data=write(rows), prompt_field="question", answer_field="solution", answer_in="last_number")
    assert train_task(source, 0)["answer"] == ["72"]
    rows = [{"prompt": [{"role": "user", "content": "x"}], "answer": [1.5, r"\frac{3}{2}"]}]
    task = train_task(tasks("math", data=write(rows)), 0)
    assert task["answer"] == ["1.5", r"\frac{3}{2}"] and task["messages"] == rows[0]["prompt"]


def test_programs_are_graded(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(workers=1, unsafe_code=True))
    source = tasks("code", data=write(CODE), max_tests=1)
    found = {task["messages"][0]["content"]: task for task in (train_task(source, i) for i in range(2))}
    functions, script = (found[row["prompt"]] for row in CODE)
    assert functions["tests"] == ["assert add(1, 2) == 3"] and script["tests"] == [["1 2", "3"]]
    reward = episode("code", functions, Says("```python\ndef add(a, b): return 3\n```"))
    assert reward == Reward(1.0, {"accuracy": 1.0}, {"exact": 1.0, "answered": 1.0})
    assert episode("code", script, Says("```\nprint(4)\n```")).value == 0.0
    assert episode("code", script, Says("no")).metrics["answered"] == 0.0


def test_programs_need_a_machine_that_can_isolate_them() -> None:
    assert find(config.Environment(name="code")).needs is rewards.require_code


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math", {"answer": "1"}, r"line 2: prompt is missing \(fields: answer\); write it, or set prompt_field"),
        ("math", {"prompt": "a"}, r"line 2: answer is missing \(fields: prompt\); write it, or set answer_field"),
        ("math", {"prompt": "", "answer": "1"}, "line 2: prompt = '': write a text"),
        ("math", {"prompt": 5, "answer": "1"}, "line 2: prompt = 5: expected"),
        ("math", {"prompt": "a", "answer": " "}, 'line 2: answer = " ": there is no answer in it'),
        ("math", {"prompt": "a", "answer": []}, r"line 2: answer = \[\]: write at least one"),
        ("math", {"prompt": "a", "answer": None}, "line 2: answer = null: expected"),
        ("math", "{", "line 2: .* it is not JSON"),
        ("code", {"prompt": "a"}, r"line 2: tests is missing \(fields: prompt\); write it, or set tests_field"),
        ("code", {"prompt": "a", "tests": []}, r"line 2: tests = \[\]: write at least one"),
        ("code", {"prompt": "a", "tests": [1]}, r"line 2: tests\[0\] = 1: write a pair of texts"),
    ],
)
def test_a_wrong_line_is_named(write: Any, name: str, row: Any, message: str) -> None:
    good = {"math": MATH, "code": CODE}[name][0]
    with pytest.raises(UserError, match=message):
        tasks(name, data=write([good, row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.jsonl"}, "data = 'nowhere.jsonl': there is no such file"),
        ({"heldout_data": "nowhere.jsonl"}, "heldout_data = 'nowhere.jsonl': there is no such file"),
        ({"heldout": 10}, "heldout = 10: write 0 to 9"),
        ({"heldout": 1, "heldout_data": "x"}, "heldout = 1: write 0, or leave heldout_data out"),
        ({"template": "Solve it."}, "template = 'Solve it.': write {prompt}"),
        ({"extract": "box"}, "extract = 'box': write one of text, last_number"),
        ({"answer_in": "box"}, "answer_in = 'box': write one of"),
        ({"format": "r2"}, "format = 'r2': write one of r1_zero, r1"),
        ({"language": "fr"}, "language = 'fr': write one of en"),
        ({"overlong": [20, 10]}, r"overlong = \[20, 10\]: write \[margin, longest\]"),
        ({"combine": "gated"}, "combine = 'gated': set format"),
        ({"combine": "max"}, "combine = 'max': write sum or gated"),
        ({"weights": {"format": 1}}, "weights.format: there is no such part of this reward; it has accuracy"),
        ({"on_failure": "zero"}, "on_failure = 'zero': write fail or wrong"),
        ({"answers": "x"}, "environment.options.answers = 'x': math knows data"),
    ],
)
def test_a_wrong_option_is_named(write: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks("math", **{"data": write(MATH), **options})


def test_a_problem_of_both_files_is_refused(write: Any) -> None:
    with pytest.raises(UserError, match=r"b.jsonl, line 1 is a problem of data = .*a.jsonl' too"):
        tasks("math", data=write(MATH, "a.jsonl"), heldout_data=write(MATH[5:], "b.jsonl"))


def test_files_are_relative_to_the_recipe(write: Any, tmp_path: Path) -> None:
    data = write(MATH)
    table: dict[str, Any] = {"environment": {"name": "math", "options": {"data": "problems.jsonl", "other": "x"}}}
    recipes.resolve_paths(table, tmp_path)
    assert table["environment"]["options"] == {"data": data, "other": "x"}
    recipes.resolve_paths(table, Path())
    assert table["environment"]["options"]["data"] == data
