"""Pure: what a run writes down about itself, row by row, and the summary of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from async_rl.wire.messages import RolloutResult, Task

Row = dict[str, Any]
EDGE_STEPS = 3
"""reward_first and reward_last are means over so many steps."""


class EvalSummary(msgspec.Struct, frozen=True):
    """Means over the held-out tasks that finished."""

    version: int
    tasks: int
    failed: int
    reward: float
    metrics: dict[str, float]
    """Means of what the environment logs: `exact` is greedy exact match."""
    tokens: int


def sample_row(version: int, task: Task, result: RolloutResult) -> Row:
    """A held-out task and what the policy of `version` made of it, as plain data."""
    return {
        "version": version,
        "task": {"id": task.id, "data": task.data},
        "reward": result.reward,
        "parts": result.parts,
        "metrics": result.metrics,
        "finish_reason": result.finish_reason,
        "sequences": [
            {
                "tokens": np.frombuffer(sequence.tokens, np.int32).tolist(),
                "logprobs": np.frombuffer(sequence.logprobs, np.float32).tolist(),
                "spans": [[span.start, span.end, span.version, span.kv_version] for span in sequence.spans],
            }
            for sequence in result.sequences
        ],
    }


class Journal(Protocol):
    """Where rows go: a run directory (telemetry.run_directory), or a list in virtual time."""

    @property
    def rows(self) -> Sequence[Row]:
        """One per step that counts, oldest first."""
        ...

    @property
    def evaluations(self) -> Sequence[EvalSummary]: ...

    @property
    def failures_path(self) -> str:
        """Where tracebacks are."""
        ...

    def step(self, row: Row) -> None: ...

    def evaluated(self, summary: EvalSummary, samples: Sequence[Row]) -> None:
        """samples: some of its rollouts, as `sample_row` makes them."""
        ...

    def rewind(self, version: int) -> None:
        """Forget steps from `version` on: a learner starts again from that checkpoint."""
        ...

    def failed(self, group_id: int, member: int, reason: str, traceback: str) -> None:
        """An episode failed in user code."""
        ...

    def summary(self, summary: Row) -> None: ...

    def pulse(self, pulse: Row) -> None:
        """Where the run is between two steps, a few times a second: for whoever watches, not for the record."""
        ...

    def say(self, line: str) -> None:
        """Something a person who watches should know."""
        ...


def summarise(
    rows: Sequence[Row],
    evaluations: Sequence[EvalSummary],
    *,
    busy: Mapping[str, float],
    idle: Mapping[str, Mapping[str, float]],
    cpu: Mapping[str, float],
    versions: Mapping[str, int],
    regenerated: int = 0,
) -> Row:
    """The content of summary.json. Evaluations are greedy, on held-out tasks."""

    def edge(part: Sequence[Row]) -> float:
        return sum(row["reward"] for row in part) / max(1, len(part))

    # a step whose end the controller did not hear of, because it died, has no row
    steps = versions.get("trained", len(rows))
    tokens = sum(row["tokens"] for row in rows)
    changed = [row["weights_changed"] for row in rows if "weights_changed" in row]
    weighted = sum(row["tokens"] * (1 - row["masked_fraction"]) for row in rows)
    lags = [(row["lag"], row["tokens"] * (1 - row["masked_fraction"])) for row in rows]
    by_version = {evaluation.version: evaluation for evaluation in evaluations}
    before, after = by_version.get(0), by_version.get(steps)

    def evaluation(of: EvalSummary | None) -> Row | None:
        return None if of is None else {"reward": of.reward, **of.metrics, "tasks": of.tasks, "failed": of.failed}

    return {
        "steps": steps,
        "wall_s": rows[-1]["wall_s"] if rows else 0.0,
        "reward_first": edge(rows[:EDGE_STEPS]),
        "reward_last": edge(rows[-EDGE_STEPS:]),
        "eval_before": evaluation(before),
        "eval_after": evaluation(after),
        "samples": sum(row["samples"] for row in rows),
        **({"weights_changed": sum(changed) / len(changed)} if changed else {}),
        "tokens": tokens,
        "tokens_per_cpu_s": rows[-1]["tokens_per_cpu_s"] if rows else 0.0,
        "busy": dict(busy),
        "idle": {role: dict(causes) for role, causes in idle.items()},
        "cpu_s": dict(cpu),
        "lag": {
            "mean": sum(lag["mean"] * count for lag, count in lags) / max(1.0, weighted),
            "p95": max((lag["p95"] for lag, _ in lags), default=0),
            "max": max((lag["max"] for lag, _ in lags), default=0),
        },
        "masked_fraction": 1 - weighted / tokens if tokens else 0.0,
        "versions": dict(versions),
        "regenerated_tokens": regenerated,
    }
