"""A fast discrete-event model of asynchronous RL on the reference cluster: who is admitted, where it decodes, when a
step is composed and from what, and what that does to speed and to the lag of every token. A model, not the control
plane: docs/decisions/2026-11-21-staleness-frontier.md says what it was used for and what it leaves out.

    python bench/staleness_frontier.py [--seeds 1] [--write]       # peers' rules and ours
    python bench/staleness_frontier.py --plot                      # writes docs/staleness_frontier.png

    outcome = Model(Cluster(sigma=0.5), Policy(eta=4, budget=0.03), seed=1).run()

Facts of the engines: a decode step of n sequences takes step_s + seq_s * n and gives each of them one token (tokens are
fluid here, one clock per engine); at a weight update every engine stands still for pause_s and keeps its cache, so a
rollout's early tokens are old and its late ones fresh. A token's lag is v_train - version; queue time counts.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import dataclass
from datetime import date
from math import exp, inf, log
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from stamp import commit

from async_rl.simulate.command import load
from async_rl.simulate.compare import simulate_all
from async_rl.telemetry import plots

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "simulate" / "longtail.toml"
OVERRIDES = ("simulate.warmup_steps=20", "simulate.measured_steps=60")


@dataclass(frozen=True)
class Cluster:
    sigma: float = 0.5
    mean: float = 4000.0
    """Tokens of a rollout, before truncation."""
    cap: float = 8.0
    """The longest rollout, in means."""
    groups: int = 64
    size: int = 8
    generators: int = 4
    learners: int = 4
    step_s: float = 0.012
    seq_s: float = 0.00008
    concurrent: int = 1024
    pause_s: float = 2.0
    move_s: float = 0.0
    """How long the engine that a rollout moves to stands still to prefill what it has."""
    between: float = 0.0
    """Share of the variance of log length that lies between groups (hard tasks are long for all members)."""

    @property
    def rollouts(self) -> int:
        return self.groups * self.size

    def tau(self, n: float) -> float:
        """Seconds per token of every sequence on an engine that runs n."""
        return self.step_s + self.seq_s * n

    @property
    def train_rate(self) -> float:
        """Tokens per second of the learner: the generators' at full concurrency."""
        return self.concurrent / self.tau(self.concurrent / self.generators)

    def lengths(self, rng: np.random.Generator, groups: int) -> list[list[float]]:
        own, common = rng.standard_normal((groups, self.size)), rng.standard_normal((groups, 1))
        normal = (1 - self.between) ** 0.5 * own + self.between**0.5 * common
        x = np.exp(self.sigma * normal - self.sigma**2 / 2)
        return np.maximum(1.0, np.minimum(x, self.cap) * self.mean).tolist()

    def synchronous_s(self, steps: int = 400, seed: int = 10_000) -> float:
        """Seconds of a synchronous step: all devices generate, then all devices train, then the weights are swapped."""
        x = self._steps(steps, seed)
        devices = self.generators + self.learners
        generate = self.step_s * x.max(1) + self.seq_s / devices * x.sum(1)
        train = x.sum(1) / (self.train_rate * devices / self.learners)
        return float((generate + train).mean()) + self.pause_s

    def one_step_off_s(self, steps: int = 400, seed: int = 10_000) -> float:
        """Generators sample step v + 1 while the learner trains step v."""
        x = self._steps(steps, seed)
        generate = self.step_s * x.max(1) + self.seq_s / self.generators * x.sum(1)
        return float(np.maximum(generate, x.sum(1) / self.train_rate).mean()) + self.pause_s

    def _steps(self, steps: int, seed: int) -> np.ndarray:
        return np.array(self.lengths(np.random.default_rng(seed), steps * self.groups)).reshape(steps, -1)


@dataclass(frozen=True)
class Policy:
    eta: int = 4
    steps_ahead: int | None = None
    """Of the capacity formula; default eta."""
    concurrency: float = 1024.0
    """At most so many rollouts decode at once; where `steer` is set, where it starts."""
    steer: bool = False
    """Move `concurrency` so that the doomed share stays at `aim` * budget."""
    aim: float = 0.9
    gain: float = 0.05
    smooth: float = 0.3
    """Weight of the newest step in the mean of the doomed share."""
    release: str = "deadline"
    """When a scored rollout may be trained: 'group' (its whole group is there), 'survivors' (`survivors` of it are),
    'deadline' (the group is there, or its oldest token has reached eta - slack; at least `survivors` of it are there).
    slack None: 0, or 1 while the capacity formula leaves engine slots empty."""
    survivors: int = 2
    slack: int | None = 0
    wait: str = "none"
    """Which step waits: none; all (while a rollout in flight would exceed eta); share (while more than `share` of the
    rollouts in flight would); doomed (while composing would put the doomed tokens over the budget)."""
    share: float = 0.0
    budget: float = 0.0
    window: float = 4.0
    """Steps' worth of budget that may be saved up, wait = doomed."""
    ladder: tuple[float, ...] = ()
    """Shares of the concurrency per engine, fastest first; engines with the largest share take the new groups, a free
    slot elsewhere takes the longest rollout of the slower engines. () = no ladder."""
    pick: str = "tokens"
    """Who is moved: most 'tokens' so far; 'oracle': most tokens at its end."""
    drop: bool = False
    """A peer's rule: whole rollouts over eta are discarded where a batch is formed."""


class Rollout:
    __slots__ = (
        "done",
        "early",
        "ended_at",
        "engine",
        "finished",
        "group",
        "head",
        "id",
        "length",
        "masked",
        "released",
        "since",
        "stamp",
        "stints",
        "version",
    )  # fmt: skip

    def __init__(self, id: int, group: Group, length: float, head: int) -> None:
        self.id, self.group, self.length, self.head = id, group, length, head
        self.done, self.since, self.stamp = 0.0, 0.0, 0
        self.engine: Engine | None = None
        self.stints: list[tuple[Engine, float, float]] = []
        """(engine, its clock at the start, at the end)"""
        self.finished = self.released = self.early = False
        self.version = -1
        """The step that trained it."""
        self.masked = 0.0

    def before(self, version: int) -> float:
        """Tokens sampled by weights older than `version`."""
        if self.head >= version:
            return 0.0
        total = sum(max(0.0, min(end, e.swap(version)) - start) for e, start, end in self.stints)
        if self.engine is not None:
            total += max(0.0, min(self.engine.clock, self.engine.swap(version)) - self.since)
        return total


class Group:
    __slots__ = ("head", "id", "left", "members")

    def __init__(self, id: int, head: int) -> None:
        self.id, self.head = id, head
        self.members: list[Rollout] = []
        self.left = 0

    @property
    def there(self) -> int:
        return len(self.members) - self.left


class Engine:
    """Its rows advance together; `clock` counts the tokens each row has been given."""

    def __init__(self, cluster: Cluster, index: int) -> None:
        self.cluster, self.index = cluster, index
        self.clock, self.time, self.frozen = 0.0, 0.0, False
        self.swaps = [0.0]
        """swaps[v]: the clock at which version v went live."""
        self.ends: list[tuple[float, int, int, Rollout]] = []
        self.order: list[tuple[float, int, int, Rollout]] = []
        self.rows: dict[Rollout, None] = {}

    @property
    def n(self) -> int:
        return len(self.rows)

    def swap(self, version: int) -> float:
        return self.swaps[version] if version < len(self.swaps) else inf

    def sync(self, now: float) -> None:
        if not self.frozen and self.rows:
            self.clock += max(0.0, now - self.time) / self.cluster.tau(len(self.rows))
        self.time = max(self.time, now)

    def longest(self) -> Rollout | None:
        """The row with the most tokens; without moves into this engine simply the one that came first."""
        order = self.order
        while order and (order[0][3].engine is not self or order[0][3].stamp != order[0][2]):
            heapq.heappop(order)
        return order[0][3] if order else None

    def tokens(self, rollout: Rollout) -> float:
        return rollout.done + self.clock - rollout.since

    def next_end(self) -> float:
        ends = self.ends
        while ends and (ends[0][3].engine is not self or ends[0][3].stamp != ends[0][2]):
            heapq.heappop(ends)
        if not ends or self.frozen:
            return inf
        return self.time + max(0.0, ends[0][0] - self.clock) * self.cluster.tau(len(self.rows))


@dataclass
class Outcome:
    step_s: float
    speedup: float
    masked: float
    """Share of trained tokens over eta."""
    over: float
    """Share of trained rollouts with a token over eta."""
    max_lag: int
    fully_masked: int
    """Trained rollouts without a token of weight."""
    length_ratio: float
    """Cohort of admitted groups followed to its end: mean length of what was trained / submitted."""
    unmasked_ratio: float
    """The same for tokens with weight."""
    untrained: int
    """Of that cohort."""
    deciles: list[float]
    """Masked share by length decile, shortest first."""
    running: float
    mean_lag: float
    """Over tokens with weight."""
    learner_busy: float
    waited: float
    """Share of the time in which only the wait rule held the step back."""
    early: float
    """Share of rollouts trained before their group was complete."""
    moves: float
    """Moves per rollout."""
    longest_queue: int
    """Most steps a finished rollout was passed over."""
    discarded: float
    trace: list[tuple[float, float]]
    """(concurrency, masked share) by step."""


class Model:
    def __init__(self, cluster: Cluster, policy: Policy, *, seed: int = 0, warm: int = 20, steps: int = 60) -> None:
        self.c, self.p, self.warm, self.steps = cluster, policy, warm, steps
        self.rng = np.random.default_rng(seed)
        self.drawn: list[list[float]] = []
        self.engines = [Engine(cluster, i) for i in range(cluster.generators)]
        self.now, self.version = 0.0, 0
        self.groups: dict[int, Group] = {}
        """Incomplete, in order of admission."""
        self.admitted = self.running = self.composed = self.discarded = self.moves = 0
        """Rollouts."""
        self.ready: list[tuple[int, int, Rollout]] = []
        """A heap: oldest-admitted first."""
        self.flight: dict[int, dict[Rollout, None]] = {}
        """Rollouts that are admitted and not composed, by head version."""
        self.decoding: dict[int, dict[Rollout, None]] = {}
        """Those of them that are not finished."""
        self.mean_length = 0.0
        """Of the latest batch."""
        self.training_until = self.pause_until = inf
        self.batches: list[list[Rollout]] = []
        self.done_at: list[float] = []
        self.limit = float(policy.concurrency)
        self.doomed_mean: float | None = None
        self.saved = 0.0
        """Tokens of budget saved up."""
        self.area = self.busy = self.waited = 0.0
        self.waiting_since: float | None = None
        self.pressure: float | None = None
        """Tokens that the step would have doomed at its first opportunity."""
        self.trace: list[tuple[float, float]] = []

    # --- admission: at a free slot, a version, a higher limit ---------------------------------------------------

    def admit(self) -> None:
        if self.pause_until < inf:
            return
        c, p = self.c, self.p
        ahead = p.eta if p.steps_ahead is None else p.steps_ahead
        backlog = (ahead + self.version + 1) * c.rollouts  # (min(eta, depth) + v + 1) Q - (consumed + ready + running)
        while self.running + c.size <= self.limit and self.admitted - self.discarded + c.size <= backlog:
            group = Group(self.admitted // c.size, self.version)
            self.groups[group.id] = group
            engine = min(self.base(), key=lambda e: e.n)
            engine.sync(self.now)
            flight = self.flight.setdefault(self.version, {})
            decoding = self.decoding.setdefault(self.version, {})
            for length in self.members():
                rollout = Rollout(self.admitted, group, length, self.version)
                self.admitted += 1
                group.members.append(rollout)
                flight[rollout] = decoding[rollout] = None
                self.place(rollout, engine)
            group.left = c.size
            self.running += c.size

    def members(self) -> list[float]:
        if not self.drawn:
            self.drawn = self.c.lengths(self.rng, 512)
        return self.drawn.pop()

    def place(self, rollout: Rollout, engine: Engine) -> None:
        rollout.engine, rollout.since = engine, engine.clock
        rollout.stamp += 1
        engine.rows[rollout] = None
        heapq.heappush(engine.order, (engine.clock - rollout.done, rollout.id, rollout.stamp, rollout))
        heapq.heappush(engine.ends, (engine.clock + rollout.length - rollout.done, rollout.id, rollout.stamp, rollout))

    def leave(self, rollout: Rollout) -> None:
        engine = rollout.engine
        assert engine is not None
        del engine.rows[rollout]
        rollout.stints.append((engine, rollout.since, engine.clock))
        rollout.done += engine.clock - rollout.since
        rollout.engine = None

    # --- the ladder: at a free slot of a fast engine ------------------------------------------------------------

    def base(self) -> list[Engine]:
        """The engines that take new groups."""
        shares = self.p.ladder
        return [e for e in self.engines if shares[e.index] == max(shares)] if shares else self.engines

    def climb(self) -> None:
        """The longest rollout of the slower engines takes a free slot of a fast one."""
        shares = self.p.ladder
        top = max(shares)
        for fast in self.engines:
            if shares[fast.index] == top:
                return
            while fast.n + 1 <= shares[fast.index] * self.limit:
                best, most = None, -1.0
                for slow in self.engines:
                    if shares[slow.index] <= shares[fast.index]:
                        continue
                    slow.sync(self.now)
                    if self.p.pick == "oracle":
                        found = max(slow.rows, key=lambda r: r.length, default=None)
                        size = found.length if found else -1.0
                    else:
                        found = slow.longest()
                        size = slow.tokens(found) if found else -1.0
                    if size > most:
                        best, most = found, size
                if best is None:
                    break
                fast.sync(self.now)
                self.leave(best)
                self.place(best, fast)
                self.moves += 1
                if self.c.move_s and not fast.frozen:
                    fast.time = max(fast.time, self.now) + self.c.move_s

    # --- a rollout ends -----------------------------------------------------------------------------------------

    def finish(self, rollout: Rollout) -> None:
        self.leave(rollout)
        rollout.finished = True
        rollout.ended_at = self.version
        self.running -= 1
        del self.decoding[rollout.head][rollout]
        group = rollout.group
        group.left -= 1
        if group.left == 0:
            del self.groups[group.id]
        if group.left == 0 or (self.p.release == "survivors" and group.there >= self.p.survivors):
            self.let_go(group)

    def let_go(self, group: Group) -> None:
        """Its finished members may be trained."""
        for rollout in group.members:
            if rollout.finished and not rollout.released:
                rollout.released, rollout.early = True, group.left > 0
                heapq.heappush(self.ready, (group.id, rollout.id, rollout))

    # --- composition: the learner is idle and something changed -------------------------------------------------

    def due(self) -> list[Group]:
        """Incomplete groups whose finished members would lose tokens if they were left for the next step."""
        slack = self.p.slack
        if slack is None:
            slack = int(self.running + 2 * self.c.size <= self.limit)
        limit, found = self.version - self.p.eta + slack, []
        for group in self.groups.values():
            if group.head > limit:
                break
            if group.there >= self.p.survivors:
                found.append(group)
        return found

    def may_compose(self) -> bool:
        p, v = self.p, self.version
        if p.wait == "none":
            return True
        old = [r for head, some in self.decoding.items() if head <= v - p.eta for r in some]
        if p.wait == "all":
            return not old
        if p.wait == "share":
            return len(old) <= p.share * max(1, self.running)
        if not old:  # what has ended gains nothing from waiting
            return True
        return self.doomed(old) <= self.saved + p.budget * self.c.rollouts * self.mean_length

    def doomed(self, left: list[Rollout]) -> float:
        """Tokens that can never have weight once step v is composed without them: version v - eta, not in the batch.
        Each masked token is counted here once, at the step that decides it."""
        old = self.version - self.p.eta
        for e in self.engines:
            e.sync(self.now)
        return sum(r.before(old + 1) - r.before(old) for r in left)

    def compose(self) -> None:
        c, p, v = self.c, self.p, self.version
        if self.training_until < inf:
            return
        due = self.due() if p.release == "deadline" else []
        here = len(self.ready) + sum(not r.released for g in due for r in g.members if r.finished)
        if here < c.rollouts:
            return
        if p.steer and self.pressure is None:
            old = [r for head, some in self.decoding.items() if head <= v - p.eta for r in some]
            self.pressure = self.doomed(old)
        for group in due:
            self.let_go(group)
        if p.drop and not self.discard():
            return
        if not self.may_compose():
            if self.waiting_since is None:
                self.waiting_since = self.now
            return
        if self.waiting_since is not None:
            self.waited += self.now - self.waiting_since
            self.waiting_since = None
        batch = [heapq.heappop(self.ready)[2] for _ in range(c.rollouts)]
        for r in batch:
            r.version, r.masked = v, r.before(v - p.eta)
            del self.flight[r.head][r]
        tokens = sum(r.length for r in batch)
        self.mean_length = tokens / len(batch)
        self.batches.append(batch)
        self.composed += len(batch)
        self.training_until = self.now + tokens / c.train_rate
        self.busy += tokens / c.train_rate
        self.trace.append((self.limit, sum(r.masked for r in batch) / tokens))
        if p.steer or p.wait == "doomed":
            self.account(tokens)

    def account(self, tokens: float) -> None:
        """After step v is composed: what it doomed, the budget, the concurrency from here on."""
        p = self.p
        left = [r for head, some in self.flight.items() if head <= self.version - p.eta for r in some]
        doomed = self.doomed(left)
        self.saved = min(self.saved + p.budget * tokens - doomed, p.window * p.budget * tokens)
        if not p.steer or self.version < p.eta:
            self.pressure = None
            return
        share, self.pressure = (self.pressure or 0.0) / tokens, None
        self.doomed_mean = share if self.doomed_mean is None else (1 - p.smooth) * self.doomed_mean + p.smooth * share
        error = log(max(p.aim * p.budget, 1e-4) / max(self.doomed_mean, 1e-4))
        limit = self.limit * exp(p.gain * max(-2.0, min(2.0, error)))
        self.limit = min(self.c.concurrent, max(self.c.rollouts * p.eta / 8, limit))

    def discard(self) -> bool:
        kept = [item for item in self.ready if self.version - item[2].head <= self.p.eta]
        for _, _, r in self.ready:
            if self.version - r.head > self.p.eta:
                del self.flight[r.head][r]
                self.discarded += 1
        self.ready = kept
        heapq.heapify(kept)
        return len(kept) >= self.c.rollouts

    # --- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        while len(self.done_at) < self.warm + self.steps:
            if self.p.ladder:
                self.climb()
            self.admit()
            self.compose()
            ends = [e.next_end() for e in self.engines]
            at = min(*ends, self.training_until, self.pause_until)
            if at == inf:
                raise RuntimeError(f"nothing can ever happen: {self.running=} {len(self.ready)=}")
            if len(self.done_at) >= self.warm:
                self.area += self.running * (at - self.now)
            self.now = at
            if at == self.pause_until:
                self.pause_until = inf
                for e in self.engines:
                    e.time, e.frozen = max(at, e.time), False
            elif at == self.training_until:
                self.training_until = inf
                self.version += 1
                self.done_at.append(at)
                for e in self.engines:
                    e.sync(at)
                    e.swaps.append(e.clock)
                    e.frozen = True
                self.pause_until = at + self.c.pause_s
            else:
                e = self.engines[ends.index(at)]
                e.sync(at)
                clock, _, _, rollout = heapq.heappop(e.ends)
                e.clock = max(e.clock, clock)
                self.finish(rollout)
        return self.outcome()

    def outcome(self) -> Outcome:
        seconds = self.done_at[-1] - self.done_at[self.warm - 1]
        measured = [r for batch in self.batches[self.warm : self.warm + self.steps] for r in batch]
        every = [r for batch in self.batches for r in batch]
        lengths, masked = np.array([r.length for r in measured]), np.array([r.masked for r in measured])
        parts = np.array_split(np.argsort(lengths), 10)
        lags = [
            v * (r.before(r.version - v + 1) - r.before(r.version - v)) for r in measured for v in range(self.p.eta + 1)
        ]
        # the cohort: groups admitted after the warm-up and early enough to be followed to their end
        groups = {r.group.id: r.group for r in every}
        first = min(r.group.id for r in self.batches[self.warm])
        last = min(r.group.id for r in self.batches[-8])
        for g in self.groups.values():
            groups[g.id] = g
        cohort = [r for g in range(first, last) if g in groups for r in groups[g].members]
        kept = [r for r in cohort if r.version >= 0]
        submitted = float(np.mean([r.length for r in cohort]))
        return Outcome(
            step_s=seconds / self.steps,
            speedup=self.c.synchronous_s() * self.steps / seconds,
            masked=float(masked.sum() / lengths.sum()),
            over=float(np.mean([r.version - r.head > self.p.eta for r in measured])),
            max_lag=max(r.version - r.head for r in measured),
            fully_masked=int((masked >= lengths - 1e-6).sum()),
            length_ratio=float(np.mean([r.length for r in kept])) / submitted,
            unmasked_ratio=float(np.mean([r.length - r.masked for r in kept])) / submitted,
            untrained=len(cohort) - len(kept),
            deciles=[float(masked[part].sum() / lengths[part].sum()) for part in parts],
            running=self.area / seconds,
            mean_lag=sum(lags) / float((lengths - masked).sum()),
            learner_busy=self.busy / self.now,
            waited=self.waited / self.now,
            early=float(np.mean([r.early for r in measured])),
            moves=self.moves / max(1, len(every)),
            longest_queue=max(r.version - r.ended_at for r in measured),
            discarded=self.discarded / (self.discarded + len(every)),
            trace=self.trace,
        )


LANE = (0.12, 0.88 / 3, 0.88 / 3, 0.88 / 3)
"""One engine runs at most 12 % of what decodes: the longest rollouts."""


def ours(eta: int, budget: float, lane: bool = True) -> Policy:
    ladder = LANE if lane else ()
    return Policy(eta, wait="doomed", budget=budget, concurrency=128 * eta, steer=True, ladder=ladder, slack=None)


def arms(eta: int, budget: float) -> dict[str, Policy]:
    """Whole groups wherever a peer's rule consumes them."""
    groups = {"eta": eta, "release": "group"}
    return {
        "no bound (AReaL, SkyRL)": Policy(**groups),
        "discard what is over": Policy(**groups, drop=True),
        "wait": Policy(**groups, wait="all", concurrency=640 if eta == 4 else 512),
        "wait while 2 % in flight are over": Policy(**groups, wait="share", share=0.02, concurrency=640),
        f"ours, budget {budget:.0%}, no lane": ours(eta, budget, lane=False),
        f"ours, budget {budget:.0%}": ours(eta, budget),
    }


# --- the frontier as a picture: peers' rules in the model, ours in the control plane -----------------------------

BUDGETS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08)
CONCURRENCIES = (192, 256, 384, 512, 640, 768, 1024)
CASES = ((4, 0.5), (2, 0.5), (4, 1.0), (2, 1.0))
"""(eta, sigma) of each panel."""
Point = tuple[float, float]
"""(share of the tokens over eta, or of the rollouts discarded; speed-up over synchronous)"""


def peers(eta: int, sigma: float, seeds: int) -> dict[str, list[Point]]:
    """Each rule at every concurrency; in the model, whole groups."""
    groups = {"eta": eta, "release": "group"}
    rules: dict[str, list[Policy]] = {
        "no bound: over eta, with weight": [Policy(**groups, concurrency=n) for n in CONCURRENCIES],
        "discard: rollouts thrown away": [Policy(**groups, drop=True, concurrency=n) for n in CONCURRENCIES],
        "wait for every straggler": [Policy(**groups, wait="all", concurrency=n) for n in CONCURRENCIES],
        "wait while 2 % in flight are over": [
            Policy(**groups, wait="share", share=0.02, concurrency=n) for n in CONCURRENCIES
        ],
    }
    found: dict[str, list[Point]] = {}
    for rule, policies in rules.items():
        points: list[Point] = []
        for policy in policies:
            runs = [Model(Cluster(sigma=sigma), policy, seed=seed).run() for seed in range(seeds)]
            over = sum(run.discarded if policy.drop else run.masked for run in runs) / len(runs)
            points.append((over, sum(run.speedup for run in runs) / len(runs)))
        found[rule] = [max(points, key=lambda point: point[1])] if rule.startswith("wait for") else sorted(points)
    return found


def control_plane(seeds: int) -> dict[tuple[int, float], list[Point]]:
    """Ours at every budget: the controller, ledger and wire as they are, in virtual time, on the same cluster."""
    jobs = [
        ("asynchronous", load(RECIPE, [*OVERRIDES, f"staleness.max_staleness={eta}", f"simulate.sigma={sigma}",
         f"staleness.mask_budget={budget}", f"simulate.seeds={seeds}"]))
        for eta, sigma in CASES
        for budget in BUDGETS
    ]  # fmt: skip
    found: dict[tuple[int, float], list[Point]] = {case: [] for case in CASES}
    for index, one in enumerate(simulate_all(jobs)):
        case = CASES[index // len(BUDGETS)]
        cluster = Cluster(sigma=case[1])
        synchronous = cluster.rollouts * float(np.mean(cluster._steps(400, 10_000))) / cluster.synchronous_s()
        found[case].append((one.figures.masked_share, one.figures.tokens_per_s / synchronous))
    return found


def frontier(seeds: int) -> list[dict[str, Any]]:
    """Of each case, points of ours and of every peer's rule."""
    found = control_plane(seeds)
    return [
        {"eta": eta, "sigma": sigma, "ours": found[eta, sigma], "peers": peers(eta, sigma, seeds)}
        for eta, sigma in CASES
    ]


def plot(panels: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 7.6), dpi=150, layout="constrained", facecolor="white")
    styles = ((plots.VERMILION, "o", 4), (plots.GREY, "o", 4), (plots.GREEN, "D", 9), (plots.ORANGE, "o", 4))
    for axes, panel in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
        for (colour, marker, size), (rule, points) in zip(styles, panel["peers"].items(), strict=True):
            over, speed = zip(*points, strict=True)
            axes.plot(100 * np.array(over), speed, f"{marker}-", color=colour, ms=size, lw=1, label=rule)
        over, speed = zip(*panel["ours"], strict=True)
        label = "async_rl, mask_budget 0, 1, 2, 3, 5, 8 %: masked, weight 0"
        axes.plot(100 * np.array(over), speed, "o-", color=plots.BLUE, ms=6, lw=2.2, label=label)
        axes.set_title(f"eta {panel['eta']}, sigma {panel['sigma']:g}", loc="left", fontsize=11, color=plots.INK)
        axes.set_xlim(-0.5, 20)
        axes.set_ylim(0.9, None)
        axes.set_xlabel("% of the tokens over eta (discard: % of the rollouts)", fontsize=9.5)
        axes.set_ylabel("throughput over synchronous", fontsize=9.5)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    title = "Speed against stale tokens: ours from the control plane in virtual time, peers' rules from a model"
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=plots.INK)
    FigureCanvasAgg(figure).print_png(path)


def stamp(seeds: int) -> dict[str, object]:
    return {"date": date.today().isoformat(), "commit": commit(), "seeds": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    parser.add_argument("--plot", action="store_true", help="draw docs/staleness_frontier.png: eight CPU minutes")
    options = parser.parse_args()
    if options.plot:
        panels = frontier(options.seeds)
        results = ROOT / "bench" / "results" / "staleness_frontier_simulated.json"
        results.write_text(json.dumps({**stamp(options.seeds), "panels": panels}, indent=2) + "\n")
        plot(panels, ROOT / "docs" / "staleness_frontier.png")
        for panel in panels:
            print(panel["eta"], panel["sigma"], [(f"{y:.2f}x", f"{x:.2%}") for x, y in panel["ours"]])
        return
    figures: list[dict[str, object]] = []
    for eta, sigma, budget in ((4, 0.5, 0.03), (2, 0.5, 0.08), (4, 1.0, 0.05)):
        print(f"eta {eta}, sigma {sigma}: speed-up, masked share, length ratio, that of unmasked tokens")
        for name, policy in arms(eta, budget).items():
            runs = [Model(Cluster(sigma=sigma), policy, seed=seed).run() for seed in range(options.seeds)]
            found = {
                field: sum(getattr(run, field) for run in runs) / len(runs)
                for field in ("speedup", "masked", "length_ratio", "unmasked_ratio", "discarded", "fully_masked")
            }
            figures.append({"eta": eta, "sigma": sigma, "rule": name, **found})
            print(
                f"  {name:<36} {found['speedup']:.2f}x  {found['masked']:5.1%}  {found['length_ratio']:.3f}"
                f"  {found['unmasked_ratio']:.3f}  discarded {found['discarded']:.0%}",
                flush=True,
            )
    if options.write:
        path = ROOT / "bench" / "results" / "staleness_frontier.json"
        path.write_text(json.dumps({**stamp(options.seeds), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
