"""Adaptive KL coefficient (Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2).

beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon),   target 6, horizon 10000

KL is that of whole answers: sum_t (log pi - log reference)_t, averaged over n of them. Trap: n >= horizon / 0.2 could
turn beta negative.
"""

from __future__ import annotations

HORIZON = 10_000.0
CLIP = 0.2


def adaptive_kl(value: float, kl: float, n_steps: int, *, target: float = 6.0, horizon: float = HORIZON) -> float:
    """The coefficient after `n_steps` samples whose KL to the reference was `kl`."""
    error = min(max(kl / target - 1.0, -CLIP), CLIP)
    return value * (1.0 + error * n_steps / horizon)
