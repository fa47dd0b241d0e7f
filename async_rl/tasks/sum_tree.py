"""Pure: numbers whose sum is kept, so that one of them is drawn in proportion, or changed, in O(log n)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class SumTree:
    """Weights of 0 .. n - 1, none below 0. A parent is the sum of its two children, computed anew at every change, so
    that no rounding error is carried on.

    >>> tree = SumTree([1.0, 0.0, 3.0])
    >>> [tree.at(share) for share in (0.0, 0.24, 0.26, 0.99)]
    [0, 0, 2, 2]
    """

    def __init__(self, weights: Iterable[float]) -> None:
        leaves = array("d", weights)
        self._size = 1 << max(0, len(leaves) - 1).bit_length()
        padding = array("d", bytes(8 * (self._size - len(leaves))))
        self._nodes = array("d", bytes(8 * self._size)) + leaves + padding
        """Root at 1, children of k at 2 k and 2 k + 1."""
        for node in range(self._size - 1, 0, -1):
            self._sum(node)

    @property
    def total(self) -> float:
        return self._nodes[1]

    def set(self, index: int, weight: float) -> None:
        node = self._size + index
        self._nodes[node] = weight
        while node > 1:
            node //= 2
            self._sum(node)

    def at(self, share: float) -> int:
        """Where the running sum passes `share` of the total, which is above 0; never one of weight 0. 0 <= share < 1"""
        rest, node = share * self.total, 1
        while node < self._size:
            left = self._nodes[2 * node]
            # rounding may leave a rest where nothing is on the right
            goes_right = rest >= left and self._nodes[2 * node + 1] > 0
            node = 2 * node + goes_right
            if goes_right:
                rest -= left
        return node - self._size

    def _sum(self, node: int) -> None:
        self._nodes[node] = self._nodes[2 * node] + self._nodes[2 * node + 1]
