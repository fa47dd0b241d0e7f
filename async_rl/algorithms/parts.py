"""What each part of an objective may be: its type, the literals it admits, its bounds."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

INFINITY = float("inf")

BOUNDS: dict[str, tuple[float, float]] = {
    "ddof": (0, 1),
    "advantage_eps": (0, 1),
    "reward_clip": (0, INFINITY),
    "clip_low": (0, INFINITY),
    "clip_high": (0, INFINITY),
    "dual_clip": (1, INFINITY),
    "rho_bar": (1e-6, INFINITY),
    "c_bar": (0, INFINITY),
    "rho": (0, INFINITY),
    "tau": (0, INFINITY),
    "tau_positive": (0, INFINITY),
    "tau_negative": (0, INFINITY),
    "guard_low": (0, INFINITY),
    "guard_high": (0, INFINITY),
    "veto": (0, 1),
    "opsm_delta": (0, INFINITY),
    "dppo_low": (0, 1),
    "dppo_high": (0, 1),
    "kl_coef": (0, INFINITY),
    "entropy_coef": (-INFINITY, INFINITY),
}
"""Both ends are allowed."""
DIVISORS = ("kl_target", "kl_horizon")
"""Finite, above 0."""


def check_parts(objective: Any) -> None:
    """Each part on its own. Raises ValueError naming the part, its value and what to write instead."""
    hints = typing.get_type_hints(type(objective))
    for field in dataclasses.fields(objective):
        _check(field.name, getattr(objective, field.name), hints[field.name])


def _allowed(hint: Any) -> tuple[Any, ...]:
    """The literals and types a field admits."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_args(hint):
        return tuple(option for part in typing.get_args(hint) for option in _allowed(part))
    return (hint,)


def _check(name: str, value: object, hint: Any) -> None:
    allowed = _allowed(hint)
    if value is None and type(None) in allowed:
        return
    literals = [option for option in allowed if isinstance(option, str)]
    if literals:
        if value not in literals:
            raise ValueError(f"{name} = {value!r}: write one of {', '.join(map(repr, literals))}")
        return
    if bool in allowed:
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}: write true or false")
        return
    whole = int in allowed
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if name in DIVISORS:
        if not number or not 0 < float(typing.cast(float, value)) < INFINITY:
            raise ValueError(f"{name} = {value!r}: write a number above 0")
        return
    low, high = BOUNDS[name]
    if not number or not low <= float(typing.cast(float, value)) <= high:
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{name} = {value!r}: write {kind} from {low:g} to {high:g}")
