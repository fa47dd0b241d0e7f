"""Pure: the page that a browser gets, and what it is told: a Reading and rows as plain data for dashboard.js."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from async_rl.config import Run
from async_rl.telemetry.journal import EvalSummary, Row
from async_rl.telemetry.progress import CAUSES, stage_words
from async_rl.telemetry.reading import GeneratorReading, GroupReading, Reading, Recent
from async_rl.telemetry.token_text import Decode, pieces
from async_rl.telemetry.usage import BUSY

FILES = Path(__file__).parent
MAX_ROWS = 600
"""Steps that a page begins with; of a longer run, evenly chosen ones."""
RECENT_STEPS = 10
"""Whose lags are shown by value."""
ALARMS = {
    "mismatch": "Engine and learner do not agree on log-probs under the same weights.",
    "length_bias": "What is trained on is not as long as what was submitted.",
    "all_filtered": "Group after group has equal rewards and is filtered: nothing to learn from.",
    "all_failed": "Episode after episode fails; failures.jsonl has the tracebacks.",
}
COUNTS = ("admitted", "trained", "filtered", "failed", "cancelled", "reasons")
ON_STALE = {"mask": "masked", "drop": "dropped", "wait": "waited for", "off": "trained on"}
"""What happens to a token over the bound."""
KEPT = {
    "version": "version",
    "wall_s": "wall_s",
    "reward": "reward",
    "masked_fraction": "masked_fraction",
    "ess_frac": "ess_frac",
    "guarded_fraction": "guarded_fraction",
    "clip_fraction": "clip_fraction",
    "entropy": "entropy",
    "equal_version_gap": "equal_version_gap",
    "equal_version_limit": "equal_version_limit",
    "completion_length_mean": "length",
    "tokens_per_s": "tokens_per_s",
    "tokens_per_cpu_s": "tokens_per_cpu_s",
}
"""Of a row of metrics.jsonl -> name on the page."""


class Page(NamedTuple):
    body: bytes
    policy: str
    """Content-Security-Policy: nothing but this page's own style and script runs, and it talks to nobody else."""


def page() -> Page:
    """One file that needs nothing else."""
    style = (FILES / "dashboard.css").read_text()
    script = (FILES / "dashboard_charts.js").read_text() + (FILES / "dashboard.js").read_text()
    text = (FILES / "dashboard.html").read_text().replace("/*css*/", style).replace("/*js*/", script)
    only = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    return Page(text.encode(), f"{only}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def about(run: Run, name: str, samples: str) -> Row:
    """What does not change. samples: why there are none, or empty."""
    return {
        "name": name,
        "environment": run.environment.name,
        "algorithm": run.algorithm.preset,
        "model": Path(run.model.path).name or "a tiny model",
        "steps": run.steps,
        "step_rollouts": run.step_rollouts,
        "generators": run.generator.count,
        "max_staleness": run.staleness.max_staleness,
        "on_stale": {"mask": "masked", "drop": "dropped", "wait": "waited for", "off": "trained on"}[
            run.staleness.on_stale
        ],
        "mask_budget": run.staleness.mask_budget if run.staleness.on_stale == "mask" else None,
        "causes": CAUSES,
        "work": dict.fromkeys(BUSY.values(), True),
        "alarms": ALARMS,
        "samples": samples,
    }


def history(rows: Sequence[Row]) -> list[Row]:
    """Of the whole run, at most MAX_ROWS: evenly chosen, and the last ones all."""
    chosen = range(len(rows))
    if len(rows) > MAX_ROWS:
        stride = -(-len(rows) // (MAX_ROWS - RECENT_STEPS))
        chosen = [*range(0, len(rows) - RECENT_STEPS, stride), *range(len(rows) - RECENT_STEPS, len(rows))]
    return [point(rows[index], rows[index - 1] if index else None) for index in chosen]


def points(rows: Sequence[Row], former: Row | None) -> list[Row]:
    """Of steps that follow `former`."""
    return [point(row, before) for before, row in itertools.pairwise([former, *rows]) if row is not None]


def point(row: Row, before: Row | None) -> Row:
    kept = {name: row[key] for key, name in KEPT.items() if key in row}
    lag = row["lag"]
    seconds = None if before is None or before["epoch"] != row["epoch"] else row["wall_s"] - before["wall_s"]
    return kept | {
        "lag_mean": lag["mean"],
        "lag_max": lag["max"],
        "lag_tokens": lag.get("tokens", {}),
        "step_s": seconds,
    }


def status(
    reading: Reading, groups: Sequence[GroupReading], num_groups: int, pulse: Mapping[str, Any], *, stopping: bool
) -> Row:
    """groups: the oldest of `num_groups`. pulse: the last one, empty before the first."""
    ledger, usage = reading.ledger, reading.usage
    now = {"stage": reading.stage, "done": 0, "total": 0, "ready": 0, "version": reading.version}
    return {
        "stage": reading.stage,
        "words": stage_words({**now, **pulse}, reading.run),
        "version": reading.version,
        "paused": reading.paused,
        "stopping": stopping,
        "turn": reading.turn,
        "evaluates": reading.run.evaluation.tasks > 0,
        "shares": usage.shares,
        "rates": usage.rates,
        "ledger": {name: getattr(ledger, name) for name in COUNTS},
        "alive": reading.alive,
        "free": reading.free,
        "queued": reading.queued,
        "lane": reading.lane,
        "generators": [_generator(one, usage.rate_of.get(one.name)) for one in reading.generators],
        "groups": [one._asdict() for one in groups],
        "num_groups": num_groups,
        "alarms": reading.alarms,
    }


def evaluations(summaries: Sequence[EvalSummary]) -> list[Row]:
    return [msgspec.to_builtins(one) for one in summaries]


def sample(recent: Recent, decode: Decode) -> Row:
    """The last sequence of a rollout, by who wrote it."""
    rollout = recent.rollout
    sampled = sum(span.end - span.start for sequence in rollout.sequences for span in sequence.spans)
    return {
        "step": recent.step,
        "group": rollout.group_id,
        "member": rollout.member,
        "reward": rollout.reward,
        "tokens": sampled,
        "pieces": pieces(rollout.sequences[-1], decode),
    }


def _generator(one: GeneratorReading, rate: float | None) -> Row:
    return {
        "name": one.name,
        "connection": one.connection,
        "version": one.version,
        "held": one.held,
        "free": one.free,
        "rate": rate,
        "engine": one.gauges,
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
