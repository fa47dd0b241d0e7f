"""Pure: which rows each optimiser step trains on: a function of the seed, the lengths of the rows and the step alone.

So the position in the data is the number of the step, which every checkpoint holds, and a run that continues trains on
the very rows it would have trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Exactly one of steps and epochs, and one of rows and tokens, is above 0."""

    rows: Sequence[int]
    """Those that are trained on."""
    tokens_N: Sequence[int]
    """Of every row of the data."""
    seed: int
    steps: int = 0
    epochs: float = 0.0
    batch_rows: int = 0
    batch_tokens: int = 0

    def batches(self) -> Iterator[list[int]]:
        """Rows of step 0, 1, 2 ... Epochs follow each other without a gap: a batch may end one and begin the next,
        and only the last batch of all may be smaller."""
        made, batch, tokens = 0, list[int](), 0
        for row in self._stream():
            if self.batch_rows:
                full = len(batch) == self.batch_rows
            else:
                full = bool(batch) and tokens + self.tokens_N[row] > self.batch_tokens
            if full:
                yield batch
                made, batch, tokens = made + 1, [], 0
                if made == self.steps:
                    return
            batch.append(row)
            tokens += self.tokens_N[row]
        if batch:
            yield batch

    def count(self) -> int:
        """Optimiser steps in all."""
        return self.steps or sum(1 for _ in self.batches())

    def _stream(self) -> Iterator[int]:
        """Every row once an epoch, in a new order."""
        left = round(self.epochs * len(self.rows)) if self.epochs else None
        epoch = 0
        while left is None or left > 0:
            order = list(self.rows)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            order = order if left is None else order[:left]
            yield from order
            left = None if left is None else left - len(order)
            epoch += 1


def set_apart(count: int, heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on and of those held out, each ascending."""
    order = list(range(count))
    random.Random(f"{seed}/split").shuffle(order)
    return sorted(order[heldout:]), sorted(order[:heldout])
