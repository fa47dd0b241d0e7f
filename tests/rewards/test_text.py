"""Rewards for what a reply looks like, and their combination; the golden cases of the algorithms hold for them too."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl import rewards
from async_rl.algorithms.repetition import loops, repeat_stop
from async_rl.rewards.text import SCRIPTS, Style

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["cases"]


def golden(op: str) -> list[Any]:
    cases = [case for case in GOLDEN if case["op"] == op]
    assert cases
    return cases


@pytest.mark.parametrize("module", ["answers", "combine", "equality", "symbolic", "text"])
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"async_rl.rewards.{module}"))
    assert found.attempted and not found.failed


def test_the_golden_cases() -> None:
    for case in golden("format_reward"):
        assert rewards.format(case["inputs"]["response"]) == case["expected"]["format"], case["id"]
    (case,) = golden("dapo_overlong")
    found = [rewards.overlong(n, longest=20_480, margin=4_096) for n in case["inputs"]["lengths"]]
    assert found == case["expected"]["reward"]
    for case in golden("length_total"):
        inputs = case["inputs"]
        found = rewards.length(inputs["reward"], inputs["lengths"], inputs["correct"], **case["params"])
        assert found == pytest.approx(case["expected"]["total"])
    for case in golden("repeat_stop"):
        assert loops(case["inputs"]["tokens"], **case["params"]) == (case["expected"]["stop_at"] >= 0), case["id"]
    for case in golden("reward_combine"):
        rows = [dict(zip(case["inputs"], row, strict=True)) for row in zip(*case["inputs"].values(), strict=True)]
        for how in ("sum", "gated"):
            assert [rewards.combine(row, how=how).value for row in rows] == pytest.approx(case["expected"][how])


@pytest.mark.parametrize(
    ("style", "text", "well"),
    [
        ("r1", "<think> a </think> <answer> 4 </answer>", True),
        ("r1", "a </think> <answer> 4 </answer>", False),
        ("r1", "<think><think> a </think> <answer> 4 </answer>", False),
        ("think", "<think>\na\n</think>\n\nIt is 4.", True),
        ("think", "<think>\n\n</think>\n\nIt is 4.", False),
        ("think", "<think> a </think>", False),
        ("think", "<think> a It is 4.", False),
        ("think", "<think> a </think> b </think> 4", False),
        ("boxed", r"so \boxed{4}", True),
        ("boxed", r"so \boxed{4", False),
        ("boxed", r"so \boxed{ }", False),
        ("cs336", "a </think> <answer>4</answer> and more </answer>", True),
        ("cs336", "a </think><answer>4</answer>", False),
    ],
)
def test_formats(style: Style, text: str, well: bool) -> None:
    assert rewards.format(text, style) == float(well)


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("Add the two numbers.", "en", 1.0),
        ("先加 then 乘", "zh", 0.75),
        ("abc中文", "en", 1 / 3),
        ("первый second", "ru", 0.5),
        ("12 + 30 = 42, $x^2$, `print`, \\frac", "en", 0.0),
        ("```python\nwhile True: pass\n``` 好", "zh", 1.0),
        ("这是推理 </think> The answer is four.", "zh", 1.0),
        ("l'été naïf", "en", 1.0),
        ("", "en", 0.0),
    ],
)
def test_language(text: str, target: str, share: float) -> None:
    assert rewards.language(text, target) == pytest.approx(share)


def test_a_language_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"target = 'fr': write one of en, zh"):
        rewards.language("bonjour", "fr")
    assert rewards.language("ok", next(iter(SCRIPTS))) == 1.0


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.integers(0, 8),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_a_loop_is_what_the_engine_would_have_stopped_at(
    before: list[int], block: list[int], times: int, after: list[int]
) -> None:
    tokens = before + block * times + after
    rule = {"n_max": 4, "repeats": 3, "min_span": 8}
    assert loops(tokens, **rule) == (repeat_stop(tokens, **rule) >= 0)


def test_a_reply_that_loops_is_penalised() -> None:
    assert rewards.repetition([1, 2, 3] * 100) == -0.5 and rewards.repetition(range(300)) == 0.0
    assert rewards.repetition([7] * 255) == 0.0 and rewards.repetition([7] * 256, penalty=-1) == -1


def test_parts_are_combined() -> None:
    parts = {"accuracy": 1.0, "format": 0.5, "language": 0.5}
    summed = rewards.combine(parts, weights={"language": 0.2}, metrics={"exact": 1})
    assert summed.value == pytest.approx(1.6) and summed.parts["language"] == pytest.approx(0.1)
    gated = rewards.combine(parts, how="gated")
    assert gated.value == 1.0 and gated.parts == {"accuracy": 0.5, "language": 0.5} and gated.metrics == {"format": 0.5}
    assert rewards.combine({"score": -50.0}, clip=20).value == -20.0
    with pytest.raises(ValueError, match="'format' is no part of this reward; it has accuracy"):
        rewards.combine({"accuracy": 1.0}, how="gated")
    with pytest.raises(ValueError, match="'tone' is no part"):
        rewards.combine(parts, weights={"tone": 1})
