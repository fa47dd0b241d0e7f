"""Unbiased pass@k from n samples of which c are right (Chen et al. 2021, arXiv:2107.03374, Eq. 1)."""

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k); 1 when fewer than k samples are wrong."""
    return 1.0 if n - c < k else 1.0 - comb(n - c, k) / comb(n, k)
