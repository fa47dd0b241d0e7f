"""Pure: which problem comes next. Kimi k1.5's prioritized sampling and its curriculum (arXiv 2501.12599, Sec. 2.3.2).

A problem is drawn with a probability proportional to 1 - its success rate, which is a moving average over its rollouts.
With a difficulty in the tasks, easy problems come first: those above a cap are not drawn, and the cap rises to 1.

Rates are in the ledger, committed together with the end of the rollouts that changed them. A draw depends on the run's
seed, the number of the group, and the rates, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeGuard

import msgspec

from async_rl import config
from async_rl.algorithms.sampling import success_rate
from async_rl.errors import UserError
from async_rl.ledger.records import ProblemRecord
from async_rl.tasks.source import TaskSource, as_task
from async_rl.tasks.sum_tree import SumTree
from async_rl.wire.messages import Task

PRIOR = 0.5
"""Success rate of a problem that was never tried."""
SOLVED = 0.9
"""A problem whose success rate is at least this counts as solved in the metrics."""


class Problems(TaskSource, Protocol):
    """A source with a fixed list of training problems."""

    @property
    def num_problems(self) -> int: ...

    def problem(self, number: int, index: int) -> Mapping[str, Any]:
        """Problem `number`, 0 to num_problems - 1, as the index-th training task."""
        ...


def make_curriculum(
    run: config.Run,
    source: TaskSource,
    known: Mapping[int, ProblemRecord] = MappingProxyType({}),
    running: Sequence[int] = (),
) -> Curriculum | None:
    """None where the recipe asks for none. Raises UserError as Curriculum does."""
    if run.curriculum.sampling == "uniform":
        return None
    return Curriculum(source, run.curriculum, seed=run.seed, known=known, running=running)


def has_problems(source: TaskSource) -> TypeGuard[Problems]:
    return hasattr(source, "num_problems") and hasattr(source, "problem")


class Curriculum:
    """Draws the problem of each group.

    Args:
        known: what the ledger has, problem -> its record.
        running: the problem of each group that is under way, once per group.

    Raises:
        UserError: the source has no fixed list of problems, or a difficulty is missing or no number from 0 to 1.
    """

    def __init__(
        self,
        source: TaskSource,
        settings: config.Curriculum,
        *,
        seed: int,
        known: Mapping[int, ProblemRecord],
        running: Sequence[int] = (),
    ) -> None:
        if not has_problems(source):
            raise UserError(
                "curriculum.sampling = 'prioritized': this environment draws its tasks without end, it has no list of "
                'problems; write "uniform", or give it a source with `num_problems` and `problem`, such as Rows'
            )
        self._source, self._settings, self._seed = source, settings, seed
        self._known: dict[int, ProblemRecord] = {}
        self._rates, self._solved = 0.0, 0
        for number, record in known.items():
            if number < source.num_problems:
                self._learn(number, record)
        self._running: dict[int, int] = {}
        """problem -> groups of it under way; it is not drawn again meanwhile, if there is another one."""
        self._by_difficulty = _by_difficulty(source, settings)
        """(difficulty, problem) of those that the cap still shuts out, the easiest last."""
        shut_out = {number for _, number in self._by_difficulty}
        self._admitted = [number for number in range(source.num_problems) if number not in shut_out]
        self._tree = SumTree(0.0 if n in shut_out else self._weight(n) for n in range(source.num_problems))
        for number in running:
            if number < source.num_problems:
                self._begin(number)
        self._cap = 0.0 if shut_out else 1.0

    def task(self, index: int, version: int) -> Task:
        """The task of the index-th group, admitted while the learner is at `version`."""
        self._raise_cap(version)
        share = random.Random(f"{self._seed}/curriculum/{index}").random()
        all_under_way = self._tree.total == 0
        number = self._admitted[int(share * len(self._admitted))] if all_under_way else self._tree.at(share)
        self._begin(number)
        return msgspec.structs.replace(as_task(f"train-{index}", self._source.problem(number, index)), problem=number)

    def ended(self, number: int, outcomes: Mapping[int, float]) -> ProblemRecord | None:
        """A group of this problem has nothing under way any more.

        Args:
            outcomes: member -> 1 for success, 0 for none; what lies outside counts as the nearer one. Members that
                failed or were cancelled are not in it.

        Returns:
            What the ledger is to keep; None if no rollout was scored.
        """
        if number not in self._running:
            return None  # of a longer list, before the environment was changed
        self._running[number] -= 1
        if not self._running[number]:
            del self._running[number]
        if outcomes:
            record = self._known.get(number, ProblemRecord(PRIOR, 0))
            rate = record.rate
            for member in sorted(outcomes):  # not in the order in which they happened to end
                rate = success_rate(rate, min(1.0, max(0.0, outcomes[member])), alpha=self._settings.smoothing)
            self._learn(number, ProblemRecord(rate, record.rollouts + len(outcomes)))
        if number not in self._running:
            self._tree.set(number, self._weight(number))
        return self._known[number] if outcomes else None

    def row(self) -> dict[str, float]:
        """For the metrics of a step."""
        tried = len(self._known)
        return {
            "problems": self._source.num_problems,
            "tried": tried,
            "solved": self._solved,
            "success_rate": self._rates / tried if tried else PRIOR,
            "difficulty_cap": self._cap,
        }

    # --- inside -----------------------------------------------------------------------------------------------

    def _learn(self, number: int, record: ProblemRecord) -> None:
        before = self._known.get(number)
        if before is not None:
            self._rates -= before.rate
            self._solved -= before.rate >= SOLVED
        self._known[number] = record
        self._rates += record.rate
        self._solved += record.rate >= SOLVED

    def _begin(self, number: int) -> None:
        self._running[number] = self._running.get(number, 0) + 1
        self._tree.set(number, 0.0)

    def _weight(self, number: int) -> float:
        rate = self._known[number].rate if number in self._known else PRIOR
        return max(1.0 - rate, self._settings.floor)

    def _raise_cap(self, version: int) -> None:
        if not self._by_difficulty:
            return
        start, steps = self._settings.start, self._settings.steps
        self._cap = min(1.0, start + (1.0 - start) * version / steps)
        # the easiest are there from the start, however hard they are
        while self._by_difficulty and (self._by_difficulty[-1][0] <= self._cap or not self._admitted):
            easiest = self._by_difficulty[-1][0]
            while self._by_difficulty and self._by_difficulty[-1][0] == easiest:
                number = self._by_difficulty.pop()[1]
                self._admitted.append(number)
                if number not in self._running:
                    self._tree.set(number, self._weight(number))


def _by_difficulty(source: Problems, settings: config.Curriculum) -> list[tuple[float, int]]:
    field = settings.difficulty
    if not field:
        return []
    found: list[tuple[float, int]] = []
    for number in range(source.num_problems):
        value = source.problem(number, 0).get(field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1 or math.isnan(value):
            raise UserError(
                f"curriculum.difficulty = {field!r}: problem {number} has {value!r} there; every task needs a number "
                "from 0 (easy) to 1"
            )
        found.append((float(value), number))
    return sorted(found, reverse=True)
