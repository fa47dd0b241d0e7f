"""Products that a small model cannot work out, and a calculator that it can call: an environment of several turns.

    async-rl train recipes/calculator_smollm2.toml

Three worked examples stand before each question, so that a model of 135 M parameters writes a valid call now and then;
what it learns is to write one each time and to believe the result.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable
from typing import Any

from async_rl import Policy, Reward, Rows, Task, environment

CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
CALLED = 0.1
"""Of the reward, for a call that could be carried out."""
MOST_CALLS = 3
MAX_CHARACTERS = 60
OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: object) -> str:
    """What the tool answers, whatever it is asked; numbers, + - * / and brackets are all it knows.

    >>> calculate("(60 + 4) * 64"), calculate("2 ** 9"), calculate("1 / 0")
    ('4096', 'error: write numbers, + - * / and brackets', 'error: division by zero')
    """
    if not isinstance(expression, str) or len(expression) > MAX_CHARACTERS:
        return f"error: write an expression of at most {MAX_CHARACTERS} characters"
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):.10g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        return "error: write numbers, + - * / and brackets"


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case _:
            raise ValueError


def worked(a: int, b: int) -> list[dict[str, Any]]:
    """An example in four messages."""
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": f"{a} * {b}"}}}
    return [
        {"role": "user", "content": f"What is {a} * {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(a * b)},
        {"role": "assistant", "content": f"{a} * {b} = {a * b}"},
    ]


EXAMPLES = [*worked(23, 58), *worked(71, 14), *worked(35, 92)]


def tasks(seed: int, questions: int = 500, heldout: int = 32) -> Rows:
    pairs = random.Random(seed).sample([(a, b) for a in range(11, 100) for b in range(11, 100)], questions)
    return Rows([{"question": f"What is {a} * {b}?", "answer": a * b} for a, b in pairs], heldout=heldout, seed=seed)


@environment("calculator", tasks=tasks)
async def calculator(task: Task, policy: Policy) -> Reward:
    messages = [*EXAMPLES, {"role": "user", "content": task["question"]}]
    calls = carried_out = 0
    reply = await policy.chat(messages, tools=[CALCULATE])
    while reply.tool_calls and calls < MOST_CALLS:
        messages.append(reply.message)
        for call in reply.tool_calls:
            result = calculate(call.arguments.get("expression")) if call.name == "calculate" else "error: no such tool"
            messages.append(call.result(result))
            carried_out += not result.startswith("error")
            calls += 1
        reply = await policy.chat(messages, tools=[CALCULATE])
    numbers = re.findall(r"\d+", reply.content.replace(",", ""))
    exact = float(bool(numbers) and int(numbers[-1]) == task["answer"]) if not reply.tool_calls else 0.0
    called = CALLED * (carried_out > 0)
    return Reward(exact * (1 - CALLED) + called, {"answer": exact * (1 - CALLED), "called": called}, {"exact": exact})
