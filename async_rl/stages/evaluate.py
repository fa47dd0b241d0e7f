"""`async-rl eval`: the tasks of an environment under one set of weights, in this process.

    evaluation = evaluate(choose(Path("runs/sort")), samples=8)
    print(describe(evaluation))

Greedy and one sample by default: the same numbers as the evaluations a run makes of itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from async_rl.controller.evaluation import FIRST_EVAL_ID
from async_rl.environments.api import find, make_tasks
from async_rl.errors import UserError
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.rewards.pool import configure
from async_rl.rollout.host import Text
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.stages import estimates
from async_rl.stages.episodes import Group, Watch, episodes, nobody
from async_rl.stages.estimates import Estimate
from async_rl.stages.local_engine import make_engine, map_weights
from async_rl.stages.target import Target
from async_rl.tasks.source import TaskSource, heldout_tasks, train_task
from async_rl.wire.messages import GroupLease, RolloutResult, Sampling, Task, WeightsId

Split = Literal["heldout", "train"]
EXACT = "exact"
"""The metric that says whether a sample is right, where the environment logs it; elsewhere a reward of 1 does."""
SHOWN_CHARACTERS = 600


class SampleResult(msgspec.Struct, frozen=True):
    reward: float
    parts: dict[str, float]
    metrics: dict[str, float]
    right: bool
    finish_reason: str
    tokens: int
    """Sampled ones."""
    prompt: str
    reply: str
    """Of the last sequence: everything after its prompt."""


class TaskResult(msgspec.Struct, frozen=True):
    id: str
    data: dict[str, Any]
    samples: list[SampleResult]
    failed: int


class Failure(msgspec.Struct, frozen=True):
    task: str
    reason: str
    traceback: str


class Evaluation(msgspec.Struct, frozen=True):
    """Means are over tasks of which a sample finished; failed episodes are counted apart."""

    name: str
    version: int | None
    environment: str
    split: Split
    tasks: int
    samples: int
    """Of each task."""
    temperature: float
    dtype: str
    failed: int
    """Episodes."""
    reward: Estimate | None
    """None: every episode failed."""
    metrics: dict[str, Estimate]
    right_is: str
    """What pass@k counts as right."""
    pass_at_k: dict[int, Estimate]
    mean_at_k: Estimate | None
    """Share of right samples, k = `samples`; also pass@1."""
    tokens: int
    finish_reasons: dict[str, int]
    wall_s: float
    results: list[TaskResult]
    failures: list[Failure]


def evaluate(
    target: Target,
    *,
    tasks: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    split: Split = "heldout",
    watch: Watch = nobody,
) -> Evaluation:
    """Sample every task and score it. `tasks`: at most so many; `temperature`: default greedy for one sample, else the
    recipe's.

    Raises:
        UserError: an argument, the recipe or the model is wrong.
    """
    run = target.run
    if temperature is None:
        temperature = 0.0 if samples == 1 else run.rollout.temperature
    _check(tasks, samples, temperature, split)
    environment = find(run.environment)
    configure(run.rewards)
    environment.needs()
    chosen = _tasks(make_tasks(environment, run.environment.options, run.seed), split, tasks)
    sampling = Sampling(run.rollout.max_new_tokens, temperature, run.seed)
    leases = [
        GroupLease(FIRST_EVAL_ID + i, "eval", task, list(range(samples)), sampling) for i, task in enumerate(chosen)
    ]
    text = TokenizerText(load_tokenizer(run.model), load_stop_tokens(run.model))
    started = time.monotonic()
    groups = asyncio.run(_run(target, leases, text, watch))
    return _evaluation(target, groups, text, samples, temperature, split, time.monotonic() - started)


async def _run(target: Target, leases: list[GroupLease], text: Text, watch: Watch) -> list[Group]:
    run = target.run
    engine = make_engine(run, load_config(run.model), slots=sum(len(lease.members) for lease in leases))
    environment, timeout_s = find(run.environment), run.environment.timeout_s
    async with episodes(engine, environment, text, at_once=run.credit_rollouts, timeout_s=timeout_s) as running:
        try:
            await engine.load_weights(map_weights(Path(run.model.path), WeightsId(0, target.version or 0)))
        except ValueError as error:
            raise UserError(f"{run.model.path}: {error}") from None
        return await running.run(leases, watch)


def describe(evaluation: Evaluation) -> str:
    """What a person reads: the numbers, the best and the worst sample, the first failure."""
    e = evaluation
    how = "greedy" if e.temperature == 0 else f"temperature {e.temperature:g}"
    drawn = how if e.samples == 1 else f"{e.samples} samples each, {how}"
    split = "held-out" if e.split == "heldout" else "training"
    lines = [f"{e.name}: {e.environment}, {e.tasks} {split} tasks, {drawn}, {e.dtype}"]
    rows: list[tuple[str, Estimate]] = [] if e.reward is None else [("reward", e.reward), *e.metrics.items()]
    if e.samples > 1 and e.mean_at_k is not None:
        rows.append((f"mean@{e.samples}", e.mean_at_k))
        rows += [(f"pass@{k}", value) for k, value in e.pass_at_k.items() if k > 1]
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name:<{width}}  {_line(value)}" for name, value in rows]
    finished = sum(e.finish_reasons.values())
    if finished:
        ends = ", ".join(f"{reason} {count / finished:.0%}" for reason, count in e.finish_reasons.items())
        right = f"; right: {e.right_is}" if e.samples > 1 else ""
        lines.append(f"  {e.tokens / finished:.1f} tokens a sample; they end by: {ends}{right}; {e.wall_s:.1f} s")
    ranked = sorted(((sample, task) for task in e.results for sample in task.samples), key=lambda pair: pair[0].reward)
    if ranked:
        lines += _show("best", *ranked[-1])
    if len(ranked) > 1:
        lines += _show("worst", *ranked[0])
    if e.failures:
        first = e.failures[0]
        lines.append(f"{e.failed} of {e.tasks * e.samples} episodes failed. The first, of task {first.task}:")
        lines.append(_indent(first.traceback.strip() or first.reason, "|"))
    return "\n".join(lines)


def _check(tasks: int | None, samples: int, temperature: float, split: Split) -> None:
    if tasks is not None and tasks < 1:
        raise UserError(f"--tasks {tasks}: write 1 or more")
    if samples < 1:
        raise UserError(f"--samples {samples}: write 1 or more")
    if temperature < 0:
        raise UserError(f"--temperature {temperature:g}: write 0 (greedy) or more")
    if temperature == 0 and samples > 1:
        raise UserError(f"--temperature 0: {samples} greedy samples of a task are the same; write --samples 1")
    if split == "train" and tasks is None:
        raise UserError("--split train: training tasks have no end; write --tasks N")


def _tasks(source: TaskSource, split: Split, count: int | None) -> list[Task]:
    if split == "train":
        return [train_task(source, index) for index in range(count or 0)]
    chosen = heldout_tasks(source, len(source.heldout()) if count is None else count)
    if not chosen:
        raise UserError("the environment has no held-out tasks; write --split train --tasks N")
    return chosen


def _evaluation(
    target: Target, groups: list[Group], text: Text, samples: int, temperature: float, split: Split, wall_s: float
) -> Evaluation:
    named = {name for group in groups for result in group.results for name in result.metrics}
    exact = EXACT in named
    results = [
        TaskResult(
            group.lease.task.id,
            group.lease.task.data,
            [_sample(result, text, exact=exact) for result in group.results],
            len(group.failures),
        )
        for group in groups
    ]
    sampled = [task.samples for task in results if task.samples]
    passes = estimates.passes([[sample.right for sample in task] for task in sampled], samples)
    return Evaluation(
        name=target.name,
        version=target.version,
        environment=target.run.environment.name,
        split=split,
        tasks=len(groups),
        samples=samples,
        temperature=temperature,
        dtype=target.run.generator.dtype,
        failed=sum(len(group.failures) for group in groups),
        reward=estimates.over_tasks([[sample.reward for sample in task] for task in sampled]) if sampled else None,
        metrics={
            name: estimates.over_tasks([[sample.metrics.get(name, 0.0) for sample in task] for task in sampled])
            for name in sorted(named)
        },
        right_is=EXACT if exact else "a reward of 1 or more",
        pass_at_k=passes,
        mean_at_k=passes.get(1),
        tokens=sum(sample.tokens for task in sampled for sample in task),
        finish_reasons=dict(Counter(sample.finish_reason for task in sampled for sample in task).most_common()),
        wall_s=wall_s,
        results=results,
        failures=[
            Failure(group.lease.task.id, failed.reason, failed.traceback)
            for group in groups
            for failed in group.failures
        ],
    )


def _sample(result: RolloutResult, text: Text, *, exact: bool) -> SampleResult:
    last = result.sequences[-1]
    tokens = np.frombuffer(last.tokens, "<i4").tolist()
    begins = last.spans[0].start
    return SampleResult(
        reward=result.reward,
        parts=result.parts,
        metrics=result.metrics,
        right=(result.metrics.get(EXACT, 0.0) if exact else result.reward) >= 1.0,
        finish_reason=result.finish_reason,
        tokens=sum(span.end - span.start for sequence in result.sequences for span in sequence.spans),
        prompt=text.decode(tokens[:begins]),
        reply=text.decode(tokens[begins:]),
    )


def _line(value: Estimate) -> str:
    if value.standard_error is None or value.low is None or value.high is None:
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f}  ± {value.standard_error:.4f}  95 % [{value.low:.4f}, {value.high:.4f}]"


def _show(which: str, sample: SampleResult, task: TaskResult) -> list[str]:
    numbers: Mapping[str, float] = {"reward": sample.reward, **sample.metrics}
    listed = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
    said = [_indent(_shorten(sample.prompt), "|"), _indent(_shorten(sample.reply), ">")]
    return [f"{which}: {task.id}, {listed}, {sample.finish_reason}", *said]


def _shorten(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


def _indent(text: str, mark: str) -> str:
    return "\n".join(f"  {mark} {line}" for line in text.splitlines() or [""])
