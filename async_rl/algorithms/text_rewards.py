"""Rule rewards on text of DeepSeek-R1 (arXiv:2501.12948, Sec. 2.2-2.3): format, language consistency, their
combination.

The tag is `<think>` (one set of notes writes `<thinking>`). R1 adds accuracy and format with equal weight; "format
first" is the gated variant of the CS336 grader.
"""

from __future__ import annotations

import re
from typing import Literal

_ANSWER = re.compile(r"(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def format_reward(response: str) -> float:
    """1.0 if the response, which continues a prompt ending in `<think>`, is `... </think> <answer> ... </answer>`.

    Exactly one of each tag, in order, both bodies non-empty, only white space between and after. Stricter than CS336 on
    duplicates, laxer on white space.
    """
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if [response.count(tag) for tag in tags] != [0, 1, 1, 1]:
        return 0.0
    match = _ANSWER.fullmatch(response)
    return float(match is not None and bool(match["think"].strip()) and bool(match["answer"].strip()))


def cs336_format(response: str) -> float:
    """The rule of the CS336 grader: `</think> <answer>` and `</answer>` occur, wherever and however often."""
    return float("</think> <answer>" in response and "</answer>" in response)


def language_consistency(total_words: int, target_words: int) -> float:
    """Share of the reasoning's words in the target language; an empty reasoning gets 0.

    Numbers, code and LaTeX are not counted as words by the caller (ours).
    """
    return target_words / total_words if total_words else 0.0


def combine_rewards(
    accuracy: float, format: float, language: float = 0.0, *, how: Literal["sum", "gated"] = "sum"
) -> float:
    """sum: accuracy + format + language. gated: accuracy counts only when formatted."""
    return accuracy + format + language if how == "sum" else accuracy * format + language
