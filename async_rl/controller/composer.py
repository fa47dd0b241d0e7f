"""From the ledger to batches: what may run, which rollouts form a step, what staleness lets them do.

No clock, no wire: the controller asks after every event, and sends what comes out. The rules, in the order in which
they apply to a step v with bound eta (docs/staleness.md; docs/decisions/2026-11-21-staleness-frontier.md):

    drop      on_stale = drop: rollouts with a token older than v - eta leave
    release   finished members that would lose tokens at v + 1 do not wait for their group: it is opened
    select    Q * G slots of open groups, oldest-admitted first
    wait      while composing would doom more tokens of running rollouts than the mask budget has; where it has none,
              also while what it leaves is more than the steps to come can take in time (batching.deadlines)
    mask      the learner gives no weight to tokens older than v - eta, whatever happened here
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from async_rl.batching.deadlines import Slots, earliest_due, overbooked
from async_rl.batching.plan import plan
from async_rl.batching.selection import oldest
from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.ledger.ledger import MIN_SURVIVORS, UNUSED, Group, Ledger
from async_rl.ledger.records import StepRecord
from async_rl.ledger.states import State
from async_rl.staleness.account import Rollout, TokenAccount
from async_rl.staleness.admission import capacity
from async_rl.staleness.budget import MaskBudget
from async_rl.staleness.guard import LagHistogram, measure, tokens_by_version
from async_rl.telemetry.lengths import CohortReport, LengthCohorts
from async_rl.wire.messages import MicroBatches, RolloutResult, TerminalEvent, TrainRollout

RUN_COMPLETE = "run_complete"
"""Why rollouts are cancelled that no step needs any more."""
NO_BOUND = 1 << 60
LANE_SHARE = 0.03
"""The fast lane takes so many of the rollouts that may run; more of them would slow each other down."""

Withdraw: TypeAlias = Callable[[int, list[int], str], None]
"""(group id, members that still run, why): they ended where they are."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the learner gets for a step, and what is told about it."""

    message: MicroBatches
    lags: LagHistogram
    metrics: dict[str, float]
    """Means of what the environment logged."""
    early_fraction: float
    """Share of the rollouts whose group was not complete."""


class Composer:
    """One per controller; every change of a rollout passes through here on its way from or to the ledger.

    Args:
        room: rollouts that the generators together accept at a time.
        counted: the version since which nobody has said what was sampled.
    """

    def __init__(
        self, run: Run, ledger: Ledger, *, room: Callable[[], int], counted: Callable[[], int], withdraw: Withdraw
    ) -> None:
        self._run, self._ledger, self._generators_room, self._withdraw = run, ledger, room, withdraw
        self._counted = counted
        ledger.filter = run.rollout.filter
        eta = run.staleness.max_staleness
        self.attention_share = 0.0
        """Of the learner's Hello."""
        self._bound = NO_BOUND if run.staleness.on_stale == "off" else eta
        """Largest lag of a token with weight."""
        self._account = TokenAccount(eta)
        self._budget: MaskBudget | None = None
        budget = {"mask": run.staleness.mask_budget, "wait": 0.0}.get(run.staleness.on_stale)
        if budget is not None and not run.synchronous:  # a synchronous run has nothing old
            self._budget = MaskBudget(budget, max_staleness=eta, step_rollouts=run.step_rollouts)
        self._lengths = LengthCohorts(run.rollout.groups_per_step, run.rollout.group_size, ledger.run.next_group)
        for group in ledger.waiting():  # of an earlier controller
            self._take_over(group)

    # --- admission --------------------------------------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """Steps composed so far, in any lineage."""
        return max(self._ledger.steps, default=self._ledger.run.best_known_version - 1) + 1

    @property
    def room(self) -> float:
        """Rollouts that may run at the same time, as far as staleness is concerned."""
        return float("inf") if self._budget is None else min(self._budget.limit, self._generators_room())

    def admissible(self, version: int) -> bool:
        """Whether one more group may begin while the learner is at `version`."""
        size, running = self._run.rollout.group_size, self._ledger.live[State.RUNNING]
        return self.free(version) >= size and (running + size <= self.room or running == 0)

    def free(self, version: int) -> int:
        """Rollouts that staleness, and what the run still needs, let in while the learner is at `version`."""
        run, ledger = self._run, self._ledger
        used = self.next_step * run.step_rollouts
        free = capacity(
            steps_ahead=run.staleness.steps_ahead,
            version=version,
            per_step=run.step_rollouts,
            consumed=used,
            running=ledger.unused,
        )
        return min(free, run.steps * run.step_rollouts - used - ledger.unused)

    @property
    def position(self) -> int:
        """Groups that are trained before the next one to be admitted, if all are in order of admission."""
        return (self.next_step * self._run.step_rollouts + self._ledger.unused) // self._run.rollout.group_size

    # --- what happens to rollouts -----------------------------------------------------------------------------

    def begun(self, group: Group, members: Sequence[int]) -> None:
        """They are leased, or leased again with what is kept of them."""
        for member in members:
            tokens: dict[int, int] = {}
            for segment in group.segments.get(member, ()):
                for span in segment.spans:
                    tokens[span.version] = tokens.get(span.version, 0) + span.end - span.start
            self._account.admitted((group.id, member), tokens)

    def sampled(self, group_id: int, member: int, total: int, version: int) -> None:
        """A running rollout has `total` tokens; those since the last report were sampled by `version`."""
        self._account.sampled((group_id, member), total, version)

    def scored(self, group_id: int, results: Sequence[RolloutResult]) -> None:
        new = self._ledger.score(group_id, results)
        for result in results:
            if result.member in new:
                tokens = tokens_by_version(result)
                self._account.ended((group_id, result.member), tokens)
                self._lengths.scored(group_id, result.member, tokens.total())

    def ended(self, group: Group, members: Sequence[int], event: TerminalEvent, reason: str) -> CohortReport | None:
        """Their terminal event. Returns the length report of a cohort that is over with it."""
        if event == "cancelled":
            for member in members:
                self._lengths.withdrawn(group.id, member, self._account.total((group.id, member)))
        self._account.left((group.id, member) for member in members)
        return self._lengths.ended(group.id, members, event, followed=reason != RUN_COMPLETE)

    def tokens(self, group_id: int, member: int) -> int:
        """Sampled so far, as of the last report."""
        return self._account.total((group_id, member))

    # --- stragglers -------------------------------------------------------------------------------------------

    @property
    def lane_size(self) -> int:
        """Rollouts that decode apart from the others, because steps wait for them (controller.fast_lane); 0 = none."""
        wanted = self._run.staleness.fast_lane and self._budget is not None and self._budget.waits
        return ceil(LANE_SHARE * self.room) if wanted else 0

    def waited_for(self) -> list[Rollout]:
        """Those that decode and would make the next step wait, or the one after it; most tokens first."""
        return self._account.longest_decoding(self.next_step + 1 - self._run.staleness.max_staleness)

    # --- composition ------------------------------------------------------------------------------------------

    def compose(self, step: int) -> Batch | None:
        """The batch of a step: as it was recorded if it was composed before a crash, else a new one, None while there
        cannot be one. Commit the ledger before the learner gets it."""
        record = self._ledger.steps.get(step)
        if record is None:
            record = self._new_composition(step)
        return None if record is None else self._batch(record)

    def _new_composition(self, step: int) -> StepRecord | None:
        run, ledger, account = self._run, self._ledger, self._account
        if run.staleness.on_stale == "drop":
            self._drop_stale(step)
        self._release(step)
        if ledger.available < run.step_rollouts:
            return None
        pressure, exact = account.pressure(step), self._budget is not None and self._budget.exact
        if self._budget is not None and exact and not self._budget.allows(step, pressure, 0):
            return None  # before anything is selected: it is asked again at every event
        if exact:
            slots = earliest_due(ledger.available_slots(), run.step_rollouts, self._due)
        else:
            slots = oldest(ledger.available_slots(), run.step_rollouts)
        parts: list[tuple[int, list[int]]] = []
        empty: list[tuple[int, list[int]]] = []
        for group_id, members in slots:
            states = ledger.groups[group_id].states
            for chosen, ready in ((parts, True), (empty, False)):
                found = [member for member in members if (states[member] is State.READY) is ready]
                if found:
                    chosen.append((group_id, found))
        if not parts:
            ledger.return_slots(empty)
            return self._new_composition(step)  # of what is behind them
        rollouts = [(group_id, member) for group_id, members in parts for member in members]
        tokens = sum(account.total(rollout) for rollout in rollouts)
        if exact and self._overbooked(step, slots):
            return None
        if self._budget is not None and not exact and not self._budget.allows(step, pressure, tokens):
            return None  # what would go stale decodes on, and every event asks again
        for rollout in rollouts:
            self._lengths.composed(*rollout, account.older(rollout, step - self._bound))
        lags = self._lags(step, parts)
        record = StepRecord(step, parts, lags.weighted_tokens, lags.stale_tokens, lags.max_weighted_lag)
        ledger.compose(record, empty)
        account.left(rollouts)
        doomed = account.composed(step)
        if self._budget is not None:
            self._budget.composed(step, doomed, tokens, self._generators_room())
        return record

    def _due(self, group_id: int, member: int) -> int:
        """The last step in which none of its tokens is over eta. One of which no token is known has none of a version
        that was counted."""
        version = self._account.oldest((group_id, member))
        if version is None:
            version = max(self._ledger.groups[group_id].version, self._counted())
        return version + self._run.staleness.max_staleness

    def _overbooked(self, step: int, chosen: Slots) -> bool:
        """Whether what `chosen` leaves is more than the steps after it can take in time."""
        taken = {group_id: set(members) for group_id, members in chosen}
        left, unfinished = Counter[int](), Counter[int]()
        for group in self._ledger.waiting():
            available = group.available
            for member, used in enumerate(group.steps):
                if used == UNUSED and member not in taken.get(group.id, ()):
                    due = self._due(group.id, member)
                    left[due] += 1
                    unfinished[due] += member not in available
        return overbooked(step, left, unfinished, self._run.step_rollouts)

    def _release(self, step: int) -> None:
        """Open groups whose finished members would lose tokens in the next step; one step earlier while there is room
        for two more groups, because then steps are short of rollouts."""
        run, ledger = self._run, self._ledger
        if run.synchronous or run.staleness.on_stale == "off":
            return
        due = step - run.staleness.max_staleness
        if ledger.live[State.RUNNING] + 2 * run.rollout.group_size <= self.room:
            due += 1
        enough = max(MIN_SURVIVORS, (run.rollout.group_size + 1) // 2)  # a baseline of fewer is noise
        for group in ledger.closed(due):
            scored = group.members(State.SCORED)
            if len(scored) < enough:
                continue
            if run.rollout.filter == "uniform" and len({group.results[member].reward for member in scored}) == 1:
                continue  # whether it teaches anything is known when it is complete
            ledger.open_group(group)

    def _drop_stale(self, step: int) -> None:
        for group_id, member in self._account.older_than(step - self._run.staleness.max_staleness):
            group = self._ledger.groups.get(group_id)
            if group is None:  # it ended with another of its members
                continue
            running = self._ledger.cancel(group, "stale", [member])
            if running:
                self._withdraw(group_id, running, "stale")

    def _lags(self, step: int, parts: Sequence[tuple[int, list[int]]]) -> LagHistogram:
        results = (result for part in parts for result in self._ledger.results(*part))
        return measure(results, version=step, max_staleness=self._bound)

    def _batch(self, record: StepRecord) -> Batch:
        rollouts: list[TrainRollout] = []
        results: list[RolloutResult] = []
        early = 0
        for group_id, members in record.parts:
            group, found = self._ledger.groups[group_id], self._ledger.results(group_id, members)
            results += found
            early += len(members) if State.RUNNING in group.states else 0
            baseline = {} if group.baseline.keys() == set(members) else group.baseline
            rollouts += [TrainRollout(group_id, r.member, r.reward, r.sequences, baseline) for r in found]
        learner = self._run.learner
        lengths = [sum(len(sequence.tokens) // 4 for sequence in rollout.sequences) for rollout in rollouts]
        _check_cap(rollouts, lengths, learner.microbatch_tokens)
        planned = plan(
            lengths,
            ranks=learner.ranks,
            cap=learner.microbatch_tokens,
            groups=[rollout.group_id for rollout in rollouts],
            quadratic=self.attention_share,
        )
        replay = record.step < self._ledger.run.best_known_version
        message = MicroBatches(record.step, record.step, rollouts, planned, replay)
        lags = self._lags(record.step, record.parts)
        return Batch(message, lags, _means(results), early / max(1, len(rollouts)))

    def _take_over(self, group: Group) -> None:
        self.begun(group, group.members(State.RUNNING))
        for member in (*group.members(State.SCORED), *group.members(State.READY)):
            self._account.admitted((group.id, member))
            self._account.ended((group.id, member), tokens_by_version(group.results[member]))


def _check_cap(rollouts: Sequence[TrainRollout], lengths: Sequence[int], cap: int) -> None:
    for rollout, length in zip(rollouts, lengths, strict=True):
        if length > cap:
            raise UserError(
                f"learner.microbatch_tokens = {cap}: rollout {rollout.member} of group {rollout.group_id} has {length} "
                f"tokens with its prompts, and a rollout is trained whole; write at least {length}"
            )


def _means(results: Sequence[RolloutResult]) -> dict[str, float]:
    names = sorted({name for result in results for name in result.metrics})
    return {name: sum(r.metrics.get(name, 0.0) for r in results) / max(1, len(results)) for name in names}
