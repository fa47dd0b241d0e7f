"""Pure: where the answer is in a reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

THOUSANDS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])"
NUMBER = re.compile(rf"(?:(?<![\w)\]])-)?(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)")
QUANTITY = re.compile(rf"{NUMBER.pattern}(?:/[1-9][0-9]*(?![0-9/]))?")
CODE_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
TAGGED_BLOCK = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
END_OF_THINKING = "</think>"


def last_number(text: str) -> str | None:
    """
    >>> last_number("A dozen is 12, a thousand of them 12,000.")
    '12000'
    """
    return _last(NUMBER, text)


def last_line(text: str) -> str | None:
    """The last one with something in it."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else None


def tag(text: str) -> str | None:
    """Inside the last <answer>...</answer>, which may span lines."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside if opened and closed else None


def boxed(text: str) -> str | None:
    r"""Inside the last \boxed{...}, braces and all; None while it is open.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    _, opened, rest = text.rpartition(r"\boxed{")
    depth = 1 if opened else 0
    for i, character in enumerate(rest if opened else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
    return None


def code_block(text: str) -> str | None:
    """Inside the last fenced block."""
    found = CODE_BLOCK.findall(text)
    return found[-1] if found else None


def program(text: str) -> str | None:
    """Inside the last fenced block of Python after the thinking, or the last without a language where none has one."""
    found = [(tag.strip().lower(), body) for tag, body in TAGGED_BLOCK.findall(after_thinking(text))]
    bodies = [body for tag, body in found if tag.startswith("py")] or [body for tag, body in found if not tag]
    return bodies[-1] if bodies else None


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; all of it where there is none."""
    return text.rpartition(END_OF_THINKING)[2]


def final(text: str) -> str | None:
    r"""The answer of a mathematical reply, after its thinking: the last \boxed{...}, else (in) the last
    <answer>...</answer>, else the last formula between dollars, \(...\) or \[...\], or the last number or ratio of two,
    whichever comes later.

    >>> final(r"<think>Is it 7?</think> With $x = 2$ it is \boxed{4}, not 5.")
    '4'
    >>> final("Half of it is $\\frac{1}{2}$."), final("In $2$ hours he walks 12 km.")
    ('\\frac{1}{2}', '12')
    """
    text = after_thinking(text)
    inside = boxed(text)
    if inside is not None:
        return inside
    inside = tag(text)
    if inside is not None:
        return final(inside) if FORMULA.search(inside) else inside
    formulas, number = list(FORMULA.finditer(text)), _last(QUANTITY, text)
    if not formulas:
        return number
    later = _last(QUANTITY, text[formulas[-1].end() :])
    return later if later is not None else next(part for part in formulas[-1].groups() if part is not None)


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "text": str,
    "last_number": last_number,
    "last_line": last_line,
    "tag": tag,
    "boxed": boxed,
    "code_block": code_block,
    "final": final,
    "program": program,
}


def extract(how: str, text: str) -> str | None:
    """The answer in a reply, without the white space around it; None if there is none."""
    return (EXTRACTORS[how](text) or "").strip() or None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found: list[str] = pattern.findall(text.replace("\N{MINUS SIGN}", "-"))
    return found[-1].replace(",", "") if found else None
