"""Pure: speed and masked share of a cluster in closed form, to look at thousands of settings before simulating a few.

Tokens are fluid, the number of running rollouts is constant, lengths are independent of each other. With N running on g
generators a token takes tau = step_s + sequence_s * N / g seconds; a step of B rollouts of mean length m takes

    T = max(B m tau / N + pause_s,  B m / learners' tokens a second)

A rollout that lasts d steps and waits q of them for its batch ends, at a uniform moment u before that batch, with
max(0, d + q + u - eta) steps' worth of masked tokens. Finished members that wait for their group take up capacity, so
of depth * B rollouts only mean length / mean length of a group's longest run. What it leaves out: groups that are
opened early, the spread between engines, start-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from async_rl.config import Run
from async_rl.simulate.workload import Floats, wire_tokens

QUANTILES = 512
HALVINGS = 24


@dataclass(frozen=True)
class Estimate:
    """Of one split of the devices, one eta and one depth."""

    generators: int
    learners: int
    max_staleness: int
    depth: int
    running: float
    """Rollouts that decode at the same time."""
    step_s: float
    tokens_per_s: float
    masked_share: float


class FluidModel:
    """`train_tokens_per_s` of one learner device and the slots of one generator are those of the recipe."""

    def __init__(self, run: Run) -> None:
        self._cluster, self._rollouts = run.simulate, run.step_rollouts
        self._slots = run.simulate.concurrent / run.simulate.generators
        tokens_GM = _lengths(run)
        self._tokens_Q = np.sort(tokens_GM.ravel()).reshape(QUANTILES, -1).mean(1)
        """[QUANTILES] lengths in tokens that stand for equally many rollouts each."""
        self._mean = float(tokens_GM.mean())
        self._running_share = self._mean / float(tokens_GM.max(1).mean())

    def estimate(
        self, generators: int, learners: int, *, max_staleness: int, depth: int, masked_share: float
    ) -> Estimate:
        """With as many rollouts running as the slots, the capacity formula and the masked share allow."""
        most = min(generators * self._slots, depth * self._rollouts * self._running_share)
        found = self._at(most, generators, learners, max_staleness, depth)
        if found.masked_share > masked_share:
            least = 0.0
            for _ in range(HALVINGS):
                middle = (least + most) / 2
                found = self._at(middle, generators, learners, max_staleness, depth)
                least, most = (least, middle) if found.masked_share > masked_share else (middle, most)
            found = self._at(max(least, 1e-6), generators, learners, max_staleness, depth)
        return found

    def _at(self, running: float, generators: int, learners: int, eta: int, depth: int) -> Estimate:
        cluster = self._cluster
        token_s = cluster.step_s + cluster.sequence_s * running / generators
        tokens = self._rollouts * self._mean
        generate_s = tokens * token_s / running
        train_s = tokens / (cluster.train_tokens_per_s * learners)
        step_s = max(generate_s + cluster.pause_s, train_s)
        queue = 0.0
        if train_s > generate_s + cluster.pause_s:  # the learner is the slower side: finished rollouts pile up
            queue = max(0.0, depth - running / (self._rollouts * self._running_share))
        sampling_s = max(step_s - cluster.pause_s, 1e-9)
        steps_Q = self._tokens_Q * token_s / sampling_s
        over_Q = np.minimum(steps_Q, _mean_excess(steps_Q + queue - eta))
        masked = float(over_Q.mean() / steps_Q.mean())
        return Estimate(generators, learners, eta, depth, running, step_s, tokens / step_s, masked)


def _mean_excess(x: Floats) -> Floats:
    """Mean of max(0, x + u) over u uniform in [0, 1]."""
    return np.where(x >= 0, x + 0.5, np.where(x > -1, (x + 1) ** 2 / 2, 0.0))


def _lengths(run: Run) -> Floats:
    """[groups, members] tokens"""
    size = run.rollout.group_size
    rng = np.random.default_rng(0)
    own, common = rng.standard_normal((QUANTILES * 16, size)), rng.standard_normal((QUANTILES * 16, 1))
    return wire_tokens(run.simulate, own, common).astype(np.float64) * run.simulate.block_tokens
