"""DAPO's soft punishment of overlong answers (Yu et al. 2025, arXiv:2503.14476, Eq. 13).

    0 up to l_max - l_cache, then linear down to -1 at l_max, -1 beyond.   Defaults 20480 and 4096.

The alternative, overlong filtering, takes truncated samples out of the loss by their mask.
"""


def overlong_penalty(length: float, *, l_max: float = 20_480, l_cache: float = 4_096) -> float:
    return min(0.0, max(-1.0, (l_max - l_cache - length) / l_cache))
