"""Pure: what a recipe may add to an accuracy, for the environments that have no code of their user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from async_rl.environments.api import Reward
from async_rl.rewards.combine import combine
from async_rl.rewards.grade import Grade
from async_rl.rewards.text import SCRIPTS, Style, format, language, overlong, repetition


class Said(Protocol):
    """A reply, as far as it is looked at."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]: ...


def check_failure(on_failure: str) -> Literal["raise", "wrong"]:
    """What recipes call "fail" (the rollout) or "wrong". Raises ValueError."""
    if on_failure not in ("fail", "wrong"):
        raise ValueError(f"on_failure = {on_failure!r}: write fail or wrong")
    return "wrong" if on_failure == "wrong" else "raise"


def check_shape(
    style: str = "",
    target: str = "",
    margin: Sequence[int] = (),
    loops: bool = False,
    how: str = "sum",
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The options as plain data, for `shaped`.

    Args:
        style: `format` of this style is a part of the reward; none if empty.
        target: `language` in this one is; none if empty.
        margin: [margin, longest]: `overlong` is; none if empty.
        loops: `repetition` is.
        how: "sum" or "gated" (the accuracy counts only times the format).
        weights: of parts; 1 where none is given.

    Raises:
        ValueError: names the option, as recipes call it.
    """
    parts = {"accuracy": True, "format": style, "language": target, "overlong": margin, "repetition": loops}
    if style and style not in get_args(Style):
        raise ValueError(f"format = {style!r}: write one of {', '.join(get_args(Style))}")
    if target and target not in SCRIPTS:
        raise ValueError(f"language = {target!r}: write one of {', '.join(SCRIPTS)}")
    if margin and not (len(margin) == 2 and 0 < margin[0] <= margin[1]):
        raise ValueError(f"overlong = {list(margin)}: write [margin, longest], two numbers of tokens")
    if how not in ("sum", "gated"):
        raise ValueError(f"combine = {how!r}: write sum or gated")
    if how == "gated" and not style:
        raise ValueError("combine = 'gated': set format, which is the gate, or write sum")
    for name in weights or {}:
        if not parts.get(name):
            known = ", ".join(name for name, there in parts.items() if there)
            raise ValueError(f"weights.{name}: there is no such part of this reward; it has {known}")
    weighted = {name: float(weight) for name, weight in (weights or {}).items()}
    return {"style": style, "target": target, "margin": list(margin), "loops": loops, "how": how, "weights": weighted}


def shaped(
    accuracy: Grade,
    reply: Said,
    *,
    style: Any,
    target: str,
    margin: Sequence[int],
    loops: bool,
    how: Literal["sum", "gated"],
    weights: Mapping[str, float],
) -> Reward:
    """The reward; `exact` is 1 for a full accuracy, `answered` for a reply with an answer in it."""
    parts = {"accuracy": float(accuracy)}
    if style:
        parts["format"] = format(reply.text, style)
    if target:
        parts["language"] = language(reply.text, target)
    if margin:
        parts["overlong"] = overlong(len(reply.tokens), longest=margin[1], margin=margin[0])
    if loops:
        parts["repetition"] = repetition(reply.tokens)
    metrics = {"exact": float(accuracy == 1.0), "answered": float(not accuracy.reason.startswith("no "))}
    return combine(parts, how=how, weights=weights, metrics=metrics)
