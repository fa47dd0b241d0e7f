"""Pure: where problems come from. A source is asked by position, so that a cursor is one integer and a resumed run
continues with the very next task."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from async_rl.wire.messages import Task


class TaskSource(Protocol):
    """Tasks are plain data (what msgpack can carry). The same seed and options give the same tasks."""

    def train(self, index: int) -> Mapping[str, Any]:
        """The index-th training task, 0, 1, 2 ... without end."""
        ...

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        """Tasks that `train` never returns."""
        ...


class Rows:
    """A fixed list of tasks: in a new order every epoch, the first `heldout` of a seeded shuffle set apart. Or in the
    order that a curriculum chooses (tasks.curriculum).

    >>> rows = Rows([{"x": i} for i in range(10)], heldout=2, seed=1)
    >>> len({rows.train(i)["x"] for i in range(8)}), len(rows.heldout())
    (8, 2)
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, heldout: int, seed: int) -> None:
        if not 0 <= heldout < len(rows):
            raise ValueError(f"heldout = {heldout}: write 0 to {len(rows) - 1}, there are {len(rows)} rows")
        shuffled = list(rows)
        random.Random(f"{seed}/split").shuffle(shuffled)
        self._heldout, self._rows, self._seed = shuffled[:heldout], shuffled[heldout:], seed
        self._epoch, self._order = -1, list[int]()

    @property
    def num_problems(self) -> int:
        return len(self._rows)

    def problem(self, number: int, index: int) -> Mapping[str, Any]:
        """The same whichever task it is."""
        return self._rows[number]

    def train(self, index: int) -> Mapping[str, Any]:
        epoch, position = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._rows)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
        return self._rows[self._order[position]]

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        return self._heldout


def train_task(source: TaskSource, index: int) -> Task:
    return as_task(f"train-{index}", source.train(index))


def heldout_tasks(source: TaskSource, count: int) -> list[Task]:
    return [as_task(f"heldout-{i}", row) for i, row in enumerate(source.heldout()[:count])]


def as_task(name: str, row: Mapping[str, Any]) -> Task:
    """Raises TypeError if the row holds what cannot be sent to a generator."""
    try:
        msgspec.msgpack.encode(dict(row))
    except TypeError as error:
        raise TypeError(f"task {name} cannot be sent to a generator: {error}; use plain data") from None
    return Task(name, dict(row))
