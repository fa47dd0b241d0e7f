"""Pure: what a recipe is compared with. Three arms on the same devices, with the same rollouts.

arm           | devices                                          | learner
--------------+--------------------------------------------------+----------------------------------------------
synchronous   | all generate, then all train (colocated)         | eta = 0: waits for its whole step
one_step_off  | split                                            | eta = 1: trains step v while step v + 1 is
              |                                                  | sampled; both are joined at every step
asynchronous  | split                                            | the recipe as it is written
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf
from typing import Literal, TypeAlias

import msgspec

from async_rl.config import Curriculum, Run
from async_rl.simulate.fake_generator import EngineModel

ArmName: TypeAlias = Literal["synchronous", "one_step_off", "asynchronous"]
ARMS: tuple[ArmName, ...] = ("synchronous", "one_step_off", "asynchronous")
CHECKPOINT_STEPS = 5
"""What a checkpoint covers leaves memory."""
GRAIN = 1 / 400
"""Of the time that a rollout of mean length takes on a full engine: how finely its end is resolved."""
BEAT_S, HEARTBEAT_TIMEOUT_S = 30.0, 100.0
"""Virtual. Nobody dies here, and a heartbeat costs as much as a rollout."""


@dataclass(frozen=True)
class Arm:
    name: ArmName
    run: Run
    """What the control plane is given: lengths in wire tokens, and more steps than `steps`, lest it runs dry before."""
    engine: EngineModel
    train_rate: float
    """Wire tokens a second of all training devices together."""
    joined: bool = False
    """See FakeLearner."""
    request_at: float = 0.95
    """Share of a step after which the learner asks for the next batch."""

    @property
    def steps(self) -> int:
        """How many are simulated."""
        return self.run.simulate.warmup_steps + self.run.simulate.measured_steps

    @property
    def eta(self) -> float:
        """No token with weight may be older; infinite where the recipe says on_stale = off."""
        unbounded = self.run.staleness.on_stale == "off" and not self.joined
        return inf if unbounded else self.run.staleness.max_staleness

    @property
    def masked_share(self) -> float:
        """At most so many of the tokens may be masked."""
        staleness = self.run.staleness
        return staleness.mask_budget if staleness.on_stale == "mask" and staleness.max_staleness else 0.0


def arm(name: ArmName, run: Run) -> Arm:
    """What this arm makes of a recipe."""
    cluster, replace = run.simulate, msgspec.structs.replace
    colocated = name == "synchronous"
    devices = cluster.generators + cluster.learners
    staleness = {
        "synchronous": replace(run.staleness, max_staleness=0, depth=None, on_stale="wait"),
        "one_step_off": replace(run.staleness, max_staleness=1, depth=None, on_stale="off"),  # the join is its bound
        "asynchronous": run.staleness,
    }[name]
    slots = ceil(cluster.concurrent / cluster.generators)
    simulated = replace(
        in_blocks(run),
        staleness=staleness,
        generator=replace(run.generator, count=devices if colocated else cluster.generators, slots=slots),
    )
    engine = EngineModel(
        slots=slots,
        step_s=cluster.step_s * cluster.block_tokens,
        sequence_s=cluster.sequence_s * cluster.block_tokens,
        pause_s=cluster.pause_s,
        prefill_s=cluster.block_tokens / cluster.prefill_tokens_per_s,
        grain_s=GRAIN * cluster.mean_tokens * (cluster.step_s + cluster.sequence_s * slots),
    )
    return Arm(
        name,
        simulated,
        engine,
        train_rate=cluster.train_tokens_per_s / cluster.block_tokens * (devices if colocated else cluster.learners),
        joined=name == "one_step_off",
    )


def in_blocks(run: Run) -> Run:
    """The recipe with lengths in wire tokens, and without what is not simulated: evaluation, durable segments, how
    weights travel."""
    cluster, replace = run.simulate, msgspec.structs.replace
    block = cluster.block_tokens
    longest = max(1, round(cluster.cap * cluster.mean_tokens / block))
    return replace(
        run,
        steps=cluster.warmup_steps + cluster.measured_steps + run.staleness.steps_ahead + 2,
        rollout=replace(
            run.rollout,
            max_new_tokens=longest,
            segment_tokens=0,
            lease_tokens=ceil(run.rollout.lease_tokens / block),
        ),
        evaluation=replace(run.evaluation, tasks=0, every_steps=0),
        learner=replace(
            run.learner,
            ranks=cluster.learners,
            microbatch_tokens=max(longest, ceil(run.learner.microbatch_tokens / block)),
        ),
        weights=replace(run.weights, transport="shared_memory"),
        curriculum=Curriculum(),  # its tasks are numbers
        placement="separate",  # the synchronous arm is what colocation comes to
        checkpoint=replace(run.checkpoint, every_steps=CHECKPOINT_STEPS),
        controller=replace(run.controller, keep_rollouts="none", heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S),
        report_to=[],
    )
