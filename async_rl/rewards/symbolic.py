"""Whether two formulae are equal, by math-verify and sympy, which may compute for ever or until memory is full: only
called in a grader's process, which is killed at its deadline (pool.py)."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable

from async_rl.errors import require

EXTRA, MODULE = "math", "math_verify"
FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|min|max|gcd"
CALL = re.compile(rf"(?<![\\A-Za-z])({FUNCTIONS})\s*\(")
ROOT_OF_WORD = re.compile("√\\s*(\\w+)")


def latex(text: str) -> str:
    r"""Plain notation as LaTeX, which is what the parser reads; LaTeX stays as it is.

    >>> latex("2**(1/2)"), latex("√(x+1) + sqrt(2)")
    ('2^{1/2}', '\\sqrt{x+1} + \\sqrt{2}')
    """
    text = text.replace("**", "^").replace("·", r"\cdot ").replace("×", r"\times ").replace("π", r"\pi ")
    text = text.replace("≤", r"\le ").replace("≥", r"\ge ").replace("∞", r"\infty ")
    text = CALL.sub(r"\\\1(", text)
    text = ROOT_OF_WORD.sub(r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    for before in (r"\sqrt(", "^("):
        text = _braced(text, before)
    return text


def load() -> Callable[[str, str], bool]:
    """The grader: (answer, right answer) -> equal. Takes half a second.

    Raises:
        MissingExtra: math-verify is not installed.
    """
    module = require(MODULE, EXTRA, "comparing formulae")
    logging.getLogger(MODULE).setLevel(logging.CRITICAL)  # it warns that we switch its own time-outs off

    def parsed(text: str) -> object:
        return module.parse(f"${latex(text)}$", parsing_timeout=None)

    @functools.lru_cache(maxsize=256)
    def wanted(right: str) -> object:
        return parsed(right)  # the same for all members of a group

    def equal(answer: str, right: str) -> bool:
        return bool(module.verify(wanted(right), parsed(answer), timeout_seconds=None))

    equal("x+1", "1+x")  # the first takes longer
    return equal


def _braced(text: str, before: str) -> str:
    r"""`before` ends in the parenthesis that opens an argument; the argument gets braces instead."""
    start = text.find(before)
    while start >= 0:
        opened = start + len(before) - 1
        depth = 0
        for end in range(opened, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                text = f"{text[:opened]}{{{text[opened + 1 : end]}}}{text[end + 1 :]}"
                break
        start = text.find(before, start + 1)
    return text
