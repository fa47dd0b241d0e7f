"""Pure: what a reply looks like, as rewards. Nothing here knows whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from async_rl.algorithms.overlong import overlong_penalty
from async_rl.algorithms.repetition import loops
from async_rl.algorithms.text_rewards import cs336_format, format_reward, language_consistency
from async_rl.rewards.answers import END_OF_THINKING, boxed

Style = Literal["r1_zero", "r1", "think", "boxed", "cs336"]

THINK = "<think>"
NOT_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|</?\w+>",  # LaTeX and tags
    re.DOTALL,
)
HAN, KANA, HANGUL = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff", "\u3040-\u30ff\u31f0-\u31ff", "\uac00-\ud7af"
SCRIPTS: Mapping[str, str] = {
    "en": "A-Za-z\u00c0-\u024f",
    "zh": HAN,
    "ja": HAN + KANA,
    "ko": HANGUL,
    "ru": "\u0400-\u052f",
    "el": "\u0370-\u03ff",
    "he": "\u0590-\u05ff",
    "ar": "\u0600-\u06ff\u0750-\u077f",
    "hi": "\u0900-\u097f",
    "th": "\u0e00-\u0e7f",
}
"""Language -> the letters of its script. Languages of one script (English, French) are not told apart."""
WORD = re.compile(rf"[{HAN}{KANA}]|[^\W\d_{HAN}{KANA}]+")
"""A run of letters; where words are not spaced (Chinese, Japanese), a character."""


def format(text: str, style: Style = "r1_zero") -> float:
    r"""1.0 if the reply has the wanted form, else 0.0.

    r1_zero  continues a prompt that ends in <think>: `... </think> <answer> ... </answer>` and nothing else
    r1       the same with its own <think> in front
    think    `<think> ... </think>` and then an answer that is not empty (Qwen 3)
    boxed    a closed \boxed{...} that is not empty
    cs336    the laxer rule of CS336's grader: `</think> <answer>` and `</answer>` occur

    >>> format("2 + 2 is 4 </think> <answer> 4 </answer>"), format("4")
    (1.0, 0.0)
    """
    match style:
        case "r1_zero":
            return format_reward(text)
        case "r1":
            opened = text.lstrip()
            return format_reward(opened.removeprefix(THINK)) if opened.startswith(THINK) else 0.0
        case "think":
            opened = text.lstrip()
            inside, closed, answer = opened.removeprefix(THINK).partition(END_OF_THINKING)
            once = opened.count(THINK) == opened.count(END_OF_THINKING) == 1
            return float(bool(opened.startswith(THINK) and once and closed and inside.strip() and answer.strip()))
        case "boxed":
            return float(bool((boxed(text) or "").strip()))
        case "cs336":
            return cs336_format(text)


def language(text: str, target: str = "en") -> float:
    """The share of the reasoning's words in the target language, from 0 to 1 (DeepSeek-R1's language consistency).

    The reasoning is what stands before `</think>`, or all of it where there is none. Code, LaTeX, tags and numbers are
    no words. A language is told by its script.

    >>> language("First add, 然后乘", "en")
    0.4

    Raises:
        ValueError: the target is not among SCRIPTS.
    """
    if target not in SCRIPTS:
        raise ValueError(f"target = {target!r}: write one of {', '.join(SCRIPTS)}")
    words: list[str] = WORD.findall(NOT_WORDS.sub(" ", text.partition(END_OF_THINKING)[0]))
    wanted = re.compile(f"[{SCRIPTS[target]}]")
    return language_consistency(len(words), sum(wanted.match(word) is not None for word in words))


def overlong(num_tokens: int, *, longest: int, margin: int) -> float:
    """0 up to `longest - margin` tokens, then linear down to -1 at `longest` (DAPO, arXiv:2503.14476, Eq. 13).

    >>> overlong(900, longest=1000, margin=200)
    -0.5
    """
    return overlong_penalty(num_tokens, l_max=longest, l_cache=margin)


def repetition(tokens: Sequence[int], *, penalty: float = -0.5) -> float:
    """`penalty` if the reply fell into a loop: a block of at most 64 tokens over and over, 256 tokens long or more and
    at least 4 times; else 0."""
    return penalty if loops(tokens) else 0.0
