"""Evaluation on held-out tasks, decoded greedily. It stands outside the ledger and runs while training goes on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from async_rl.telemetry.journal import EvalSummary
from async_rl.wire.messages import Failed, Finished, GroupLease, RolloutResult, Sampling, Task

FIRST_EVAL_ID = 1 << 40
"""Evaluation groups are numbered from here; training groups from 0."""


@dataclass(slots=True)
class _Pass:
    version: int
    missing: set[int]
    done: asyncio.Future[EvalSummary]
    results: list[RolloutResult] = field(default_factory=list[RolloutResult])
    failed: int = 0


class Evaluations:
    """`begin` makes the leases of one pass; `finished` and `failed` feed it until its future is done."""

    def __init__(self, tasks: list[Task], *, max_new_tokens: int) -> None:
        self._tasks, self._max_new_tokens = tasks, max_new_tokens
        self._next_id = FIRST_EVAL_ID
        self._passes: list[_Pass] = []

    def begin(self, version: int) -> tuple[list[GroupLease], asyncio.Future[EvalSummary]]:
        """One greedy completion per held-out task, by weights of at least `version`."""
        sampling = Sampling(self._max_new_tokens, temperature=0.0)
        leases = [
            GroupLease(self._next_id + i, "eval", task, [0], sampling, min_version=version)
            for i, task in enumerate(self._tasks)
        ]
        self._next_id += len(leases)
        done: asyncio.Future[EvalSummary] = asyncio.get_running_loop().create_future()
        self._passes.append(_Pass(version, {lease.group_id for lease in leases}, done))
        return leases, done

    def finished(self, message: Finished) -> None:
        self._feed(message.group_id, message.members, 0)

    def failed(self, message: Failed) -> None:
        self._feed(message.group_id, [], 1)

    def _feed(self, group_id: int, results: list[RolloutResult], failed: int) -> None:
        for current in self._passes:
            if group_id not in current.missing:
                continue
            current.missing.remove(group_id)
            current.results += results
            current.failed += failed
            if not current.missing:
                self._passes.remove(current)
                if not current.done.done():
                    current.done.set_result(_summary(current))
            return


def _summary(finished: _Pass) -> EvalSummary:
    results = finished.results
    count = max(1, len(results))
    names = sorted({name for result in results for name in result.metrics})
    return EvalSummary(
        version=finished.version,
        tasks=len(results) + finished.failed,
        failed=finished.failed,
        reward=sum(result.reward for result in results) / count,
        metrics={name: sum(result.metrics.get(name, 0.0) for result in results) / count for name in names},
        tokens=sum(span.end - span.start for r in results for s in r.sequences for span in s.spans),
    )
