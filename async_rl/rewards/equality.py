r"""Pure: whether two mathematical answers are the same, as far as their text and exact arithmetic on rationals say.

What these rules leave open (None) is for a symbolic grader. They look at bounded text and compute with bounded numbers,
so they may run anywhere.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 2_000
"""Longer answers are wrong: no answer to a problem is."""
MAX_DIGITS = 400
"""Of a number; also the largest exponent of ten."""

SPACING = re.compile(r"\\[,!;:> ]|\\quad|\\qquad|~|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\limits")
WRAPPED = re.compile(r"\$\$?(.*?)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|boldsymbol|mathbf)\{([^{}]*)\}")
SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)")
FRACTION = re.compile(r"\\[dt]frac")
UNIT = re.compile(r"^([-+]?[\d.,/]+)\s*(?:\\text\{[^{}]*\}|[A-Za-z]{2,}[A-Za-z. ]*)$")
"""A number, and then words: twelve what?"""
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
LATEX_RATIO = re.compile(r"([-+]?)\\frac\{([^{}]+)\}\{([^{}]+)\}")
MIXED = re.compile(r"([-+]?)(\d+)(?:\s+|(?=\\frac))(?:(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})")


def normalise(text: str) -> str:
    r"""
    >>> normalise(r"$\dfrac12$."), normalise(r"1{,}000\,\text{cm}")
    ('\\frac{1}{2}', '1000cm')
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-").removesuffix(".").strip()
    wrapped = WRAPPED.fullmatch(text)
    if wrapped is not None:
        text = next(part for part in wrapped.groups() if part is not None)
    text = SPACING.sub("", text)
    text = TEXT.sub(r"\1", text)
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = FRACTION.sub(r"\\frac", text)
    text = THOUSANDS.sub(lambda match: re.sub(r"\{,\}|,", "", match[0]), text)
    return text.strip().removesuffix(".").strip()


def rational(text: str) -> Fraction | None:
    r"""The number a normalised text stands for, if it is one.

    >>> rational("-0.5"), rational("3/4"), rational(r"1\frac{1}{2}"), rational("2e3"), rational("x")
    (Fraction(-1, 2), Fraction(3, 4), Fraction(3, 2), Fraction(2000, 1), None)
    """
    if len(text) > MAX_DIGITS:
        return None
    mixed = MIXED.fullmatch(text)
    if mixed is not None:
        sign, whole, *parts = mixed.groups()
        over, under = (part for part in parts if part is not None)
        if int(under) == 0:
            return None
        value = int(whole) + Fraction(int(over), int(under))
        return -value if sign == "-" else value
    ratio = LATEX_RATIO.fullmatch(text)
    sign, over, under = ratio.groups() if ratio is not None else ("", *text.partition("/")[::2])
    above, below = _number(over), _number(under) if under or ratio is not None else Fraction(1)
    if above is None or below is None or below == 0 or (ratio is None and text.endswith("/")):
        return None
    return -above / below if sign == "-" else above / below


def same(answer: str, right: str, *, tolerance: float = 0.0) -> bool | None:
    """None: neither the texts nor exact arithmetic decide it.

    >>> same("0.50", "1/2"), same("0.33", "1/3"), same("x + 1", "1 + x")
    (True, False, None)

    Args:
        tolerance: two numbers are the same if they differ by at most this share of the right one.
    """
    if len(answer) > MAX_CHARACTERS:
        return False
    said, meant = normalise(answer), normalise(right)
    if re.sub(r"\s+", "", said) == re.sub(r"\s+", "", meant):
        return True
    number = rational(meant)
    if number is None:
        return None
    value = rational(said)
    if value is None:
        unit = UNIT.match(said)
        value = rational(unit[1].strip()) if unit is not None else None
    if value is None:
        return None
    return abs(value - number) <= Fraction(tolerance) * abs(number)


def _number(text: str) -> Fraction | None:
    text = text.strip()
    if NUMBER.fullmatch(text) is None:
        return None
    _, _, exponent = text.lower().partition("e")
    return None if exponent and abs(int(exponent)) > MAX_DIGITS else Fraction(text)
