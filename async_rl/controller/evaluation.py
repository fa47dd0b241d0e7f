"""Evaluation on held-out tasks, decoded greedily. It stands outside the ledger and runs while training goes on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeAlias

from async_rl.telemetry.journal import EvalSummary, Row, sample_row
from async_rl.wire.messages import Failed, Finished, GroupLease, RolloutResult, Sampling, Task

FIRST_EVAL_ID = 1 << 40
"""Evaluation groups are numbered from here; training groups from 0."""
MAX_SAMPLES = 32
"""Rollouts of a pass that are kept to be read."""
Evaluated: TypeAlias = tuple[EvalSummary, list[Row]]
"""A summary, and samples."""


@dataclass(slots=True)
class _Pass:
    version: int
    tasks: dict[int, Task]
    """By group id, in order."""
    done: asyncio.Future[Evaluated]
    results: dict[int, RolloutResult] = field(default_factory=dict[int, RolloutResult])
    ended: set[int] = field(default_factory=set[int])


class Evaluations:
    """`begin` makes the leases of one pass; `finished` and `failed` feed it until its future is done."""

    def __init__(self, tasks: list[Task], *, max_new_tokens: int) -> None:
        self._tasks, self._max_new_tokens = tasks, max_new_tokens
        self._next_id = FIRST_EVAL_ID
        self._passes: list[_Pass] = []

    def begin(self, version: int) -> tuple[list[GroupLease], asyncio.Future[Evaluated]]:
        """One greedy completion per held-out task, by weights of at least `version`."""
        sampling = Sampling(self._max_new_tokens, temperature=0.0)
        leases = [
            GroupLease(self._next_id + i, "eval", task, [0], sampling, min_version=version)
            for i, task in enumerate(self._tasks)
        ]
        self._next_id += len(leases)
        done: asyncio.Future[Evaluated] = asyncio.get_running_loop().create_future()
        self._passes.append(_Pass(version, {lease.group_id: lease.task for lease in leases}, done))
        return leases, done

    @property
    def progress(self) -> tuple[int, int]:
        """Tasks that ended, of how many, over the passes that are not done."""
        return sum(len(one.ended) for one in self._passes), sum(len(one.tasks) for one in self._passes)

    def finished(self, message: Finished) -> None:
        self._feed(message.group_id, message.members[0])

    def failed(self, message: Failed) -> None:
        self._feed(message.group_id, None)

    def _feed(self, group_id: int, result: RolloutResult | None) -> None:
        """None: the episode failed. What is said again is ignored."""
        for current in self._passes:
            if group_id not in current.tasks or group_id in current.ended:
                continue
            current.ended.add(group_id)
            if result is not None:
                current.results[group_id] = result
            if len(current.ended) == len(current.tasks):
                self._passes.remove(current)
                if not current.done.done():
                    current.done.set_result((_summary(current), _samples(current)))
            return


def _summary(finished: _Pass) -> EvalSummary:
    results = [finished.results[id_] for id_ in finished.tasks if id_ in finished.results]
    count = max(1, len(results))
    names = sorted({name for result in results for name in result.metrics})
    return EvalSummary(
        version=finished.version,
        tasks=len(finished.tasks),
        failed=len(finished.tasks) - len(results),
        reward=sum(result.reward for result in results) / count,
        metrics={name: sum(result.metrics.get(name, 0.0) for result in results) / count for name in names},
        tokens=sum(span.end - span.start for r in results for s in r.sequences for span in s.spans),
    )


def _samples(finished: _Pass) -> list[Row]:
    shown = [(task, finished.results[id_]) for id_, task in finished.tasks.items() if id_ in finished.results]
    return [sample_row(finished.version, task, result) for task, result in shown[:MAX_SAMPLES]]
