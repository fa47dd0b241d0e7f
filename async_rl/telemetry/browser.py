"""`async-rl inspect`: finds the rollouts of a run, for a person or (as JSON) for a program; also while it is at work.

show(find(RunDirectory(Path("runs/sort")), group=17))
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
from rich.console import Console, Group

from async_rl.config import Run
from async_rl.environments.api import find as find_environment
from async_rl.environments.api import make_tasks
from async_rl.errors import UserError
from async_rl.ledger import inspection, records
from async_rl.ledger.ledger import load_problems, load_run
from async_rl.ledger.records import EventRecord, GroupRecord, RunRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import Reader, Snapshot, snapshot
from async_rl.staleness.guard import measure
from async_rl.tasks.curriculum import has_problems
from async_rl.telemetry.journal import Row, summarise
from async_rl.telemetry.pages import (
    KEEPING,
    EvaluationPage,
    Failure,
    FailuresPage,
    GroupLine,
    GroupPage,
    Overview,
    Page,
    Piece,
    Problem,
    ProblemsPage,
    Readable,
    Rollout,
    Sample,
    SequenceText,
    StepPage,
    alike,
    ranges,
)
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.telemetry.token_text import Decode, cut
from async_rl.wire import messages
from async_rl.wire.messages import RolloutResult, Task, VersionSpan

LAST = -1
"""As the version of an evaluation: the newest."""
PIPE_WIDTH = 10_000
"""Tables in a pipe are not folded."""


def show(page: Page, *, as_json: bool = False, console: Console | None = None) -> None:
    """Print a page: in colours on a terminal, through the pager if it is longer than the screen; else plain, with a
    mark such as ⟦v3⟧ where the version changes. as_json: one line of JSON on stdout."""
    if as_json:
        print(json.dumps(msgspec.to_builtins(page)))
        return
    console = _console() if console is None else console
    body = Group(*page.draw(plain=console.no_color or console.color_system is None))
    if console.is_terminal and len(console.render_lines(body, pad=False)) > console.height:
        os.environ.setdefault("LESS", "-R")  # it shows colours only if it is told to
        with console.pager(styles=True):
            console.print(body)
    else:
        console.print(body, soft_wrap=not console.is_terminal)


def find(
    directory: RunDirectory,
    *,
    step: int | None = None,
    group: int | None = None,
    member: int | None = None,
    evaluation: int | None = None,
    worst: int | None = None,
    best: int | None = None,
    failures: int | None = None,
    problems: int | None = None,
) -> Page:
    """The page that the options of `async-rl inspect` ask for; the overview if they ask for none.

    Raises:
        UserError: it is no run directory, there is no such thing in it, or its tokens are gone. LedgerCorrupt.
    """
    pages = {"--step": step, "--group": group, "--eval": evaluation, "--failures": failures, "--problems": problems}
    for alternatives in (pages, {"--worst": worst, "--best": best}):
        given = [option for option, value in alternatives.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: write one of them")
    if member is not None and group is None:
        raise UserError(f"--member {member}: of which group? write --group ID --member {member}")
    for option, count in (("--worst", worst), ("--best", best)):
        if count is not None and evaluation is None:
            raise UserError(f"{option} {count}: of which evaluation? write --eval {option} {count}")
        if count is not None and count < 1:
            raise UserError(f"{option} {count}: write 1 or more")
    run = directory.load_config()
    if evaluation is not None:
        return _evaluation(directory, run, evaluation, worst, best)
    if failures is not None:
        return _failures(directory, failures)
    with snapshot(directory.ledger) as store:
        if step is not None:
            return _step(store, run, step)
        if group is not None:
            return _group(directory, store, run, group, member)
        if problems is not None:
            return _problems(store, run, problems)
        return _overview(directory, store, run)


@dataclass(frozen=True, slots=True)
class _Book:
    """What the ledger knows of its groups, without their tokens."""

    run: RunRecord
    alive: dict[int, GroupRecord]
    steps: dict[int, StepRecord]
    step_of: dict[int, int]
    """group -> the first step that holds any of it"""
    step_of_member: dict[tuple[int, int], int]
    ended: dict[int, dict[int, EventRecord]]
    """group -> member -> how it ended"""
    readable: list[int]
    """Groups with tokens on disk, in order of admission."""

    @classmethod
    def read(cls, store: Snapshot) -> _Book:
        run = load_run(store)
        groups = [records.decode(key, value, GroupRecord) for key, value in store.scan(b"group/")]
        steps = [records.decode(key, value, StepRecord) for key, value in store.scan(b"step/")]
        ended: dict[int, dict[int, EventRecord]] = {}
        for key, value in store.scan(b"event/"):
            event = records.decode(key, value, EventRecord)
            ended.setdefault(event.group_id, {}).update(dict.fromkeys(event.members, event))
        payloads = {int(key.split(b"/")[1], 16) for key in store.keys(b"payload/")}
        return cls(
            run=run,
            alive={group.group_id: group for group in groups},
            steps={step.step: step for step in steps},
            step_of={group: step.step for step in reversed(steps) for group, _ in step.parts},
            step_of_member={(group, m): step.step for step in steps for group, members in step.parts for m in members},
            ended=ended,
            readable=sorted(payloads),
        )

    def state(self, group: int) -> str:
        """How far its scored members are."""
        if group in self.step_of:
            return self.step_state(self.step_of[group])
        record = self.alive.get(group)
        return "ready" if record is not None and State.READY in record.states else "scored"

    def step_state(self, step: int) -> str:
        return "trained" if step < self.run.best_known_version else "composed"

    def members(self, group: int) -> dict[int, tuple[str, str]]:
        """member -> its live state or terminal event, and the reason"""
        record = self.alive.get(group)
        live = {} if record is None else {m: (State(s).name.lower(), "") for m, s in enumerate(record.states)}
        return live | {member: (event.event, event.reason) for member, event in self.ended.get(group, {}).items()}

    def what_there_is(self, run: Run) -> str:
        """For an error: what can be read instead."""
        steps = {self.step_of[group] for group in self.readable if group in self.step_of}
        waiting = [group for group in self.readable if group not in self.step_of]
        found = [f"of steps {ranges(steps)}"] if steps else []
        found += [f"of groups {ranges(waiting)} that no step holds yet"] if waiting else []
        there = f"there are tokens {' and '.join(found)}" if found else "there are no tokens of any group"
        return f"{there} ({KEEPING}; this run has {json.dumps(run.controller.keep_rollouts)})"


def _overview(directory: RunDirectory, store: Snapshot, run: Run) -> Overview:
    rows, evaluations = directory.load_metrics(), directory.load_evaluations()
    book, summary = _Book.read(store), summarise(rows, evaluations, busy={}, idle={}, cpu={}, versions={})
    reasons: dict[str, list[str]] = {}
    for event in [event for members in book.ended.values() for event in members.values() if event.reason]:
        reasons.setdefault(event.event, []).append(event.reason)
    here = Path.cwd()
    return Overview(
        path=str(directory.path.relative_to(here) if directory.path.is_relative_to(here) else directory.path),
        environment=run.environment.name,
        steps_done=len(rows),
        steps=run.steps,
        wall_s=summary["wall_s"],
        reward_first=summary["reward_first"] if rows else None,
        reward_last=summary["reward_last"] if rows else None,
        evaluations=evaluations,
        rollouts=inspection.report(store, max_staleness=run.staleness.max_staleness),
        reasons={event: alike(each) for event, each in reasons.items()},
        lag=summary["lag"],
        max_staleness=run.staleness.max_staleness,
        masked_fraction=summary["masked_fraction"],
        readable=[Readable(group, book.state(group), book.step_of.get(group)) for group in book.readable],
        samples=sorted({row["version"] for row in directory.load_samples()}),
        tracebacks=len(directory.load_failures()),
    )


def _step(store: Snapshot, run: Run, number: int) -> StepPage:
    book = _Book.read(store)
    record = book.steps.get(number)
    if record is None:
        there = f"this run has steps {ranges(book.steps)}" if book.steps else "this run has not composed a step yet"
        raise UserError(f"--step {number}: {there}")
    found = {group: [r for r in _results(store, group) if r.member in members] for group, members in record.parts}
    if not any(found.values()):
        raise UserError(f"--step {number}: its tokens are gone; {book.what_there_is(run)}")
    return StepPage(
        step=number,
        state=book.step_state(number),
        weighted_tokens=record.weighted_tokens,
        masked_tokens=record.stale_tokens,
        max_staleness=run.staleness.max_staleness,
        groups=[_group_line(store, book, group, number, results) for group, results in found.items() if results],
        gone=[group for group, results in found.items() if not results],
    )


def _group_line(store: Reader, book: _Book, group: int, step: int, results: list[RolloutResult]) -> GroupLine:
    task = _task(store, group)
    names = sorted({name for result in results for name in result.metrics})
    return GroupLine(
        group=group,
        task="" if task is None else task.id,
        rewards=[result.reward for result in results],
        tokens=[_sampled_tokens(result) for result in results],
        lag=_lag(results, step),
        finish_reasons=dict(Counter(result.finish_reason for result in results).most_common()),
        metrics={name: sum(r.metrics.get(name, 0.0) for r in results) / len(results) for name in names},
        failed=sum(event == "failed" for event, _ in book.members(group).values()),
    )


def _group(directory: RunDirectory, store: Snapshot, run: Run, group: int, member: int | None) -> GroupPage:
    book, results = _Book.read(store), {result.member: result for result in _results(store, group)}
    members = book.members(group)
    if not members:
        last = book.run.next_group - 1
        there = f"this run has groups {ranges(range(last + 1))}" if last >= 0 else "this run has not admitted one yet"
        raise UserError(f"--group {group}: {there}")
    if member is not None and member not in members:
        raise UserError(f"--member {member}: group {group} has members {ranges(members)}")
    if not results:
        counts = alike(f"{state}: {reason}" if reason else state for state, reason in members.values())
        why = "none of its members is scored yet" if "running" in counts else "its tokens are gone"
        what = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise UserError(f"--group {group}: {why} ({what}); {book.what_there_is(run)}")
    step = book.step_of.get(group)
    version = book.run.best_known_version if step is None else step
    decode, bound = _decoder(run), run.staleness.max_staleness
    tracebacks = {(row["group"], row["member"]): row["traceback"] for row in directory.load_failures()}
    return GroupPage(
        group=group,
        step=step,
        task=_task(store, group),
        version=version,
        max_staleness=bound,
        members=[
            _rollout(results[one], decode, state, book.step_of_member.get((group, one), version), bound)
            if one in results
            else Rollout(one, state, reason, tracebacks.get((group, one), ""))
            for one, (state, reason) in sorted(members.items())
            if member is None or one == member
        ],
    )


def _evaluation(directory: RunDirectory, run: Run, version: int, worst: int | None, best: int | None) -> EvaluationPage:
    kept: dict[int, dict[str, Row]] = {}
    """version -> task -> sample; of a version that was evaluated again, the last time counts"""
    for row in directory.load_samples():
        kept.setdefault(row["version"], {})[row["task"]["id"]] = row
    if not kept:
        raise UserError(f"--eval: {directory.path} has no samples of an evaluation yet (see evaluation.tasks)")
    version = max(kept) if version == LAST else version
    if version not in kept:
        raise UserError(f"--eval {version}: there are samples of versions {ranges(kept)}")
    before = min(kept) if min(kept) < version else None
    rows = list(kept[version].values())
    if worst is not None or best is not None:
        rows = sorted(rows, key=lambda row: row["reward"], reverse=best is not None)[: best or worst]
    decode, earlier = _decoder(run), {} if before is None else kept[before]

    def evaluated(row: Row | None) -> Rollout | None:
        return None if row is None else _rollout(_result(row), decode, "evaluated")

    summaries = {one.version: one for one in directory.load_evaluations()}
    return EvaluationPage(
        version=version,
        before=before,
        summaries=[summaries[one] for one in (before, version) if one in summaries],
        samples=[
            Sample(
                task=row["task"]["id"],
                data=row["task"]["data"],
                before=evaluated(earlier.get(row["task"]["id"])),
                after=_rollout(_result(row), decode, "evaluated"),
            )
            for row in rows
        ],
        kept=len(kept[version]),
    )


def _failures(directory: RunDirectory, count: int) -> FailuresPage:
    if count < 1:
        raise UserError(f"--failures {count}: write 1 or more")
    failures = [msgspec.convert(row, Failure) for row in directory.load_failures()]
    return FailuresPage(len(failures), alike(failure.reason for failure in failures), failures[-count:])


def _problems(store: Reader, run: Run, count: int) -> ProblemsPage:
    if count < 1:
        raise UserError(f"--problems {count}: write 1 or more")
    if run.curriculum.sampling == "uniform":
        raise UserError("--problems: this run has no curriculum, so nobody counts how often a problem is solved")
    known = [(record.rate, number, record.rollouts) for number, record in load_problems(store).items()]
    try:
        source = make_tasks(find_environment(run.environment), run.environment.options, run.seed)
    except UserError:  # it has moved, or needs what is not installed here
        source = None
    hardest = [
        Problem(number, rate, rollouts, dict(source.problem(number, 0)) if source and has_problems(source) else {})
        for rate, number, rollouts in sorted(known)[:count]
    ]
    return ProblemsPage(len(known), hardest)


# --- from records to pages ------------------------------------------------------------------------------------


def _results(store: Reader, group: int) -> list[RolloutResult]:
    found = store.scan(records.payload_prefix(group))
    results = [result for key, value in found for result in records.decode(key, value, list[RolloutResult])]
    return sorted(results, key=lambda result: result.member)


def _task(store: Reader, group: int) -> Task | None:
    value = store.get(key := records.task_key(group))
    return None if value is None else records.decode(key, value, Task)


def _result(row: Row) -> RolloutResult:
    """The rollout that journal.sample_row made this row of."""
    sequences = [
        messages.Sequence(
            np.array(sequence["tokens"], np.int32).tobytes(),
            np.array(sequence["logprobs"], np.float32).tobytes(),
            [VersionSpan(*span) for span in sequence["spans"]],
        )
        for sequence in row["sequences"]
    ]
    return RolloutResult(0, sequences, row["reward"], row["parts"], row["metrics"], row["finish_reason"])


def _rollout(
    result: RolloutResult, decode: Decode, state: str, version: int | None = None, bound: int | None = None
) -> Rollout:
    """version: of the step that trains on it, if there is one."""
    sampled = [(s, span) for s in result.sequences for span in s.spans]
    logprobs = np.concatenate([np.frombuffer(s.logprobs, "<f4")[span.start : span.end] for s, span in sampled])
    return Rollout(
        member=result.member,
        state=state,
        reward=result.reward,
        parts=result.parts,
        metrics=result.metrics,
        finish_reason=result.finish_reason,
        tokens=len(logprobs),
        lag=None if version is None else _lag([result], version),
        logprob_mean=float(logprobs.mean()),
        logprob_min=float(logprobs.min()),
        sequences=[_sequence_text(sequence, decode, version, bound) for sequence in result.sequences],
    )


def _sequence_text(sequence: messages.Sequence, decode: Decode, version: int | None, bound: int | None) -> SequenceText:
    """The text, cut where the origin of its tokens changes."""
    tokens: list[int] = np.frombuffer(sequence.tokens, "<i4").tolist()
    origins: list[VersionSpan] = []
    position = sequence.spans[0].start
    for span in sequence.spans:
        if span.start > position:
            origins.append(VersionSpan(position, span.start, -1, -1))
        origins.append(span)
        position = span.end
    if position < len(tokens):
        origins.append(VersionSpan(position, len(tokens), -1, -1))
    prompt, *texts = cut(decode, tokens, [origin.start for origin in origins])
    pieces: list[Piece] = []
    for origin, text in zip(origins, texts, strict=True):
        lag = None if version is None or origin.version < 0 else max(0, version - origin.version)
        masked = lag is not None and bound is not None and lag > bound
        piece = Piece(text, origin.start, origin.end, origin.version, origin.kv_version, lag, masked)
        pieces.append(piece)
    return SequenceText(prompt, origins[0].start, pieces)


def _sampled_tokens(result: RolloutResult) -> int:
    return sum(span.end - span.start for sequence in result.sequences for span in sequence.spans)


def _lag(results: Sequence[RolloutResult], version: int) -> tuple[int, int]:
    """Of the newest and of the oldest token."""
    lags = measure(results, version=version, max_staleness=0).tokens
    return min(lags), max(lags)


def _decoder(run: Run) -> Decode:
    from async_rl.models.loading import load_tokenizer  # torch, and seconds: only where there is text to read

    tokenizer = load_tokenizer(run.model)

    def decode(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)

    return decode


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this locale cannot
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
