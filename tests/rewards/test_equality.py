"""What text and exact arithmetic say about two answers, without a symbolic grader."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.rewards.equality import rational, same


@pytest.mark.parametrize(
    ("answer", "right", "verdict"),
    [
        ("0.5", "1/2", True),
        (r"\dfrac12", "0.50", True),
        (r"-\frac{1}{2}", "-1/2", True),
        ("1 2/3", "5/3", True),
        (r"-1\frac{2}{3}", "-5/3", True),
        ("1,234,567", "1234567", True),
        (r"1{,}000\,", "1000", True),
        ("1e3", "1000", True),
        ("−7", "-7", True),
        ("$12$", "12", True),
        ("12 dollars", "12", True),
        (r"12\text{ cm}", "12", True),
        ("5 m", "5 cm", None),
        ("42.", "42", True),
        (r"\text{yes}", "yes", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("3", "4", False),
        ("0.333333", "1/3", False),
        ("12 dollars", "13", False),
        ("1/0", "1", None),
        ("/2", "2", None),
        ("2/", "2", None),
        ("1e999999999", "1", None),
        ("9" * 500, "9", None),
        ("9" * 3000, "9", False),
        ("x", "y", None),
        ("2", "x", None),
        ("", "1", None),
    ],
)
def test_verdicts(answer: str, right: str, verdict: bool | None) -> None:
    assert same(answer, right) is verdict


def test_a_tolerance_is_a_share_of_the_right_number() -> None:
    assert same("0.3333", "1/3", tolerance=1e-3) and not same("0.33", "1/3", tolerance=1e-3)
    assert same("0", "0", tolerance=1e-3) and not same("0.001", "0", tolerance=1e-3)


@given(st.fractions())
def test_numbers_mean_what_they_say(value: Fraction) -> None:
    for text in (f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"):
        assert rational(text) == value
        assert same(text, str(value)) is True
        assert same(text, str(value + 1)) is False


@given(st.text(), st.text())
def test_any_text_has_a_verdict(answer: str, right: str) -> None:
    assert same(answer, right) in (True, False, None)
    if answer.strip():
        assert same(answer, answer) is True
