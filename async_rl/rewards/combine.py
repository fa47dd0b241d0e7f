"""Pure: named parts to one reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from async_rl.environments.api import Reward

CLIP = 20.0
"""What rewards are clipped to before they are normalised (AReaL); an option, none of ours comes near it."""


def combine(
    parts: Mapping[str, float],
    *,
    how: Literal["sum", "gated"] = "sum",
    gate: str = "format",
    gated: str = "accuracy",
    weights: Mapping[str, float] | None = None,
    clip: float | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Reward:
    """sum: the weighted parts are added (DeepSeek-R1). gated: the part `gated` counts only times the part `gate`, which
    itself is not added; the others are (the CS336 grader: format first).

    >>> combine({"accuracy": 1.0, "format": 1.0, "language": 0.5}).value
    2.5
    >>> combine({"accuracy": 1.0, "format": 0.0, "language": 0.5}, how="gated").value
    0.5

    Args:
        weights: by part; 1 where none is given.
        clip: the reward is kept within plus and minus this (CLIP, for one).
        metrics: numbers that are only logged.

    Raises:
        ValueError: a weight, or the gate, names a part that is not there.
    """
    for name in [*(weights or {}), *((gate, gated) if how == "gated" else ())]:
        if name not in parts:
            raise ValueError(f"combine: {name!r} is no part of this reward; it has {', '.join(parts) or 'none'}")
    weighted = {name: float(part) * (weights or {}).get(name, 1.0) for name, part in parts.items()}
    if how == "gated":
        weighted[gated] *= float(parts[gate])
        del weighted[gate]
    value = sum(weighted.values())
    if clip is not None:
        value = min(clip, max(-clip, value))
    return Reward(value, weighted, {**({gate: float(parts[gate])} if how == "gated" else {}), **(metrics or {})})
