"""The procedural tasks of reasoning-gym, a hundred of them: a recipe names the task and sets its difficulty.

    [environment.options]
    task = "products"
    config = { max_digits = 1 }
    questions = 100
    heldout = 30
    wordings = ["{expression} =", "What is {expression}?"]
    answer = "last_number"

The reward is what the task's own scorer says, partial credit included; a reply without an answer is None to it. A
scorer that raises met an answer it did not foresee: a wrong one, worth 0 and counted in the metric `scorer_error`. What
fails a rollout is an entry that cannot be drawn, or that is not the one the controller drew.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import io
import json
import math
import random
import string
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from async_rl.environments.api import Policy, Reward, environment
from async_rl.errors import require
from async_rl.rewards.answers import EXTRACTORS, extract
from async_rl.tasks.source import Rows
from async_rl.wire.messages import Task

DRAWS, DRAWS_PER_QUESTION = 10_000, 20
"""So many entries are drawn at most, whichever is more, until enough of their questions differ."""

HASH_ORDERED = frozenset({"codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note"})
"""Tasks whose questions come out of sets of strings: they depend on the hash seed of the process."""

EVALUATED = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorer calls Python's `eval` on the answer."""

PARSED = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Tasks whose scorer calls sympy's `parse_expr` on the answer, which rewrites it and calls `eval`."""

FUNCTIONS = frozenset(
    {"abs", "exp", "log", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
)
"""What an answer to a task in PARSED may call."""

MAX_BITS = 1000.0
"""Of what an answer to a task in PARSED may evaluate to: `9**9**9` would keep the generator busy for good."""


class ReasoningGymTasks:
    """Different questions of one task. Those with the smallest hashes are held out, training never sees them.

    Args:
        task: a reasoning-gym dataset, "products" or "rotate_matrix" for example.
        config: its difficulty, the fields of the dataset's configuration.
        questions: how many to draw, the held-out ones included.
        heldout: how many of them are held out.
        wordings: templates of the user message, with {question} and the entry's metadata as fields. Training goes
            through them by turns, a held-out question keeps the one its hash chose.
        system: a system prompt; none if empty.
        answer: where the answer is in a reply: "text" (all of it), "last_number", "last_line", "tag"
            (<answer>...</answer>), "boxed" (\\boxed{...}) or "code_block".
    """

    def __init__(
        self,
        seed: int,
        task: str,
        config: Mapping[str, Any] | None = None,
        questions: int = 1000,
        heldout: int = 64,
        wordings: Sequence[str] = ("{question}",),
        system: str = "",
        answer: str = "text",
    ) -> None:
        if questions < 1:
            raise ValueError(f"questions = {questions}: write at least 1")
        if not 0 <= heldout < questions:
            raise ValueError(f"heldout = {heldout}: write 0 to {questions - 1}, there are {questions} questions")
        if answer not in EXTRACTORS:
            raise ValueError(f"answer = {answer!r}: write one of {', '.join(EXTRACTORS)}")
        if not wordings or isinstance(wordings, str):
            raise ValueError(f"wordings = {wordings!r}: write a list of templates, such as ['{{question}}']")
        _check(task, config or {})
        self._wordings = list(wordings)
        self._constant = {"system": system, "answer": answer}
        size = max(DRAWS, DRAWS_PER_QUESTION * questions)
        # The datasets add the index to their seed: neighbouring seeds of ours would draw the same questions.
        drawn_from = {
            "task": task,
            "config": json.dumps(config or {}, sort_keys=True),
            "seed": zlib.crc32(str(seed).encode()) >> 1,
            "size": size,
        }
        rows = self._draw(drawn_from, questions)
        rows.sort(key=lambda row: row["entry"]["digest"])
        self._heldout, trained = rows[:heldout], rows[heldout:]
        assert not {row["fields"]["question"] for row in self._heldout} & {row["fields"]["question"] for row in trained}
        self._train = Rows(trained, heldout=0, seed=seed)

    def train(self, index: int) -> dict[str, Any]:
        return self._task(self._train.train(index), index)

    @property
    def num_problems(self) -> int:
        return self._train.num_problems

    def problem(self, number: int, index: int) -> dict[str, Any]:
        return self._task(self._train.problem(number, index), index)

    def heldout(self) -> list[dict[str, Any]]:
        return [self._task(row, int(row["entry"]["digest"], 16)) for row in self._heldout]

    def _task(self, row: Mapping[str, Any], position: int) -> dict[str, Any]:
        wording = self._wordings[position % len(self._wordings)]
        return {"prompt": wording.format_map(row["fields"]), "entry": row["entry"], **self._constant}

    def _draw(self, drawn_from: Mapping[str, Any], questions: int) -> list[dict[str, Any]]:
        """{"fields": what the wordings name, "entry": arguments of `entry_at`} of as many different questions."""
        used = {"question", *(name for wording in self._wordings for name in _field_names(wording))}
        rows: dict[str, dict[str, Any]] = {}
        with contextlib.redirect_stdout(io.StringIO()):  # some of the datasets print while they draw
            for index in range(drawn_from["size"]):
                entry = _draw_one(**drawn_from, index=index)
                question: str = entry["question"]
                if question in rows:
                    continue
                known = {**entry["metadata"], "question": question}
                for name in used - known.keys():
                    raise ValueError(
                        f"wordings: {{{name}}} is no field of {drawn_from['task']}; it knows {_list(known)}"
                    )
                row = {name: known[name] for name in used}
                if not rows:
                    self._try_wordings(row)
                rows[question] = {"fields": row, "entry": {**drawn_from, "index": index, "digest": _digest(question)}}
                if len(rows) == questions:
                    return list(rows.values())
        raise ValueError(
            f"questions = {questions}: {drawn_from['task']} with this config has {len(rows)} different ones "
            f"({drawn_from['size']} draws); write {len(rows)}"
        )

    def _try_wordings(self, row: Mapping[str, Any]) -> None:
        for wording in self._wordings:
            try:
                wording.format_map(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"wordings: {wording!r}: {error}") from error


def _field_names(wording: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(wording) if name is not None]
    except ValueError as error:
        raise ValueError(f"wordings: {wording!r}: {error}; a brace that is no field is written twice") from error


def _check(task: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError: there is no such task, or its configuration does not take these settings."""
    known = _gym().factory.DATASETS.keys() - {"composite"}
    if task not in known:
        close = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"reasoning-gym has {_list(known)}"
        raise ValueError(f"task = {task!r}: there is no such task; {hint}")
    if task in HASH_ORDERED and sys.flags.hash_randomization:
        raise ValueError(
            f"task = {task!r}: its questions depend on Python's string hashes and would differ between processes; "
            "run with PYTHONHASHSEED=0 in the environment"
        )
    _, configuration = _gym().factory.DATASETS[task]
    settings = [field.name for field in fields(configuration) if field.name not in ("seed", "size")]
    for name, value in config.items():
        if name not in settings:
            raise ValueError(f"config.{name} = {value!r}: {task} knows {_list(settings)}")
    try:
        _gym().create_dataset(task, **config, seed=0, size=1)
    except Exception as error:  # asserts, and comparisons with values of any wrong type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config = {dict(config)}: {reason}; {task} knows {_list(settings)}") from error


def _list(names: Mapping[str, Any] | Sequence[str] | set[str]) -> str:
    return ", ".join(names)


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()


def _gym() -> Any:
    return require("reasoning_gym", "reasoning-gym", 'environment.name = "reasoning_gym"')


@functools.lru_cache(maxsize=8)
def _dataset(task: str, config: str, seed: int, size: int) -> Any:
    return _gym().create_dataset(task, **json.loads(config), seed=seed, size=size)


def _draw_one(task: str, config: str, seed: int, size: int, index: int) -> dict[str, Any]:
    """The same everywhere: codeio, which runs the programs of its data file, and list_functions take from the global
    generators, which are seeded for that."""
    dataset, python, numpy = _dataset(task, config, seed, size), random.getstate(), np.random.get_state()
    random.seed(f"{seed}/{index}")
    np.random.seed(zlib.crc32(f"{seed}/{index}".encode()))
    try:
        return dataset[index]
    except Exception as error:
        raise ValueError(f"config = {config}: {task} cannot draw its entry {index}: {error!r}") from error
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@functools.lru_cache(maxsize=1024)
def entry_at(task: str, config: str, seed: int, size: int, index: int, digest: str) -> dict[str, Any]:
    """Drawn again, where the answer is scored: metadata is not always plain data that could be sent along."""
    entry = _draw_one(task, config, seed, size, index)
    if _digest(entry["question"]) != digest:
        raise RuntimeError(
            f"entry {index} of {task} is not the one the controller drew: it has another version of reasoning-gym, or "
            "the task depends on the hash seed of the process (PYTHONHASHSEED=0 would fix it)"
        )
    return entry


def _bits(node: ast.AST) -> float:
    """How many bits the value of an arithmetic expression may have. Raises ValueError: it is something else."""
    match node:
        case ast.Expression(body=body):
            return _bits(body)
        case ast.Constant(value=int() | float() as number):
            return math.log2(abs(number) + 2)
        case ast.Name():
            return 1
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _bits(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return max(_bits(left), _bits(right)) + 1
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
            return _bits(left) + _bits(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _bits(left) * 2.0 ** min(_bits(right), MAX_BITS)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return sum(map(_bits, arguments))
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")


def may_run(task: str, answer: str) -> bool:
    """Whether the scorer may see an answer: false for code and endless powers where it would run them.

    >>> may_run("puzzle24", "4 * (7 - 1)"), may_run("puzzle24", "9**9**9"), may_run("puzzle24", "exit()")
    (True, False, False)
    """
    try:
        if task in PARSED:
            return _bits(ast.parse(answer, mode="eval")) <= MAX_BITS
        if task in EVALUATED:
            ast.literal_eval(answer)
    except SyntaxError:
        return task in EVALUATED  # a board or a row of numbers: `eval` refuses it too, while sympy may rewrite it
    except (ValueError, OverflowError, MemoryError, RecursionError):
        return False
    return True


@environment("reasoning_gym", tasks=ReasoningGymTasks)
async def reasoning_gym(task: Task, policy: Policy) -> Reward:
    """One turn. `exact` is 1 for a full score, `extracted` for a reply with an answer in it."""
    system = [{"role": "system", "content": task["system"]}] if task["system"] else []
    reply = await policy.chat([*system, {"role": "user", "content": task["prompt"]}])
    answer = extract(task["answer"], reply.text)
    drawn: dict[str, Any] = task["entry"]
    entry = entry_at(**drawn)
    dataset = _dataset(drawn["task"], drawn["config"], drawn["seed"], drawn["size"])
    scored = answer if answer is not None and (answer == entry["answer"] or may_run(drawn["task"], answer)) else None
    score, failed = 0.0, False
    try:
        score = float(dataset.score_answer(scored, entry))
    except Exception:  # the scorers of boxnet, coin_flip, game_of_life and prime_factorization raise on odd answers
        failed = True
    metrics = {"exact": score > 1 - 1e-6, "extracted": answer is not None, "scorer_error": failed}
    return Reward(score, metrics={name: float(metric) for name, metric in metrics.items()})
