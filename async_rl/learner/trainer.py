"""The learner's state between steps: weights, optimiser, version; built from the recipe or resumed from a checkpoint.

    learner = Learner(run, run_directory)         # every rank
    if learner.ranks.rank > 0:
        learner.follow()                          # until rank 0 closes
    else:
        metrics = learner.train(batch)            # a MicroBatches message
        publisher.publish(learner.weights, learner.snapshot)
        saved = learner.begin_checkpoint()        # a future: it is written while training goes on
        learner.close()

All methods block and belong in one thread at a time; none of them knows the wire.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from async_rl.algorithms.adaptive_kl import CLIP as ADAPTIVE_KL_CLIP
from async_rl.algorithms.objective import Objective
from async_rl.algorithms.presets import preset
from async_rl.config import Model, Run
from async_rl.errors import ProtocolError, UserError
from async_rl.learner import checkpoint, commands
from async_rl.learner.batch import flatten
from async_rl.learner.checkpoint_writer import CheckpointWriter
from async_rl.learner.distributed import Ranks, choose_device
from async_rl.learner.lora import FOLDER, Adapters, add_adapters, load_adapters
from async_rl.learner.memory import Holdings, holdings
from async_rl.learner.offload import Offload, Resident
from async_rl.learner.optimisation import Abandoned, Optimisation, ignored, never
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.roles import Roles
from async_rl.learner.saved_parts import Part
from async_rl.learner.sharding import gathered
from async_rl.learner.step import TrainStep
from async_rl.models.flops import attention_share
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.models.memory import trim_heap
from async_rl.models.parameters import Layout
from async_rl.telemetry.files import write_json
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.weights.wire_layout import wire_layout
from async_rl.wire.messages import MicroBatches, WeightsId

CHECKPOINTS = "checkpoints"


class Learner:
    """Owns what training changes.

    Raises:
        UserError: the recipe's algorithm, device or model is wrong.
        saved_parts.CheckpointCorrupt: the newest checkpoint cannot be read.
    """

    def __init__(self, run: Run, run_directory: Path, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks.start(choose_device(run.learner.device))
        self._owns_ranks = ranks is None
        if run.colocated and self.ranks.size > 1:  # the recipe says 1, but torchrun's variables count
            raise UserError(
                f"placement = 'colocated': torchrun started {self.ranks.size} learner ranks, and one generator and one "
                "learner rank share a device: start one, or write separate"
            )
        self._run = run
        self._run_directory, self._measured = RunDirectory(run_directory), False
        directory = run_directory / CHECKPOINTS
        self._sharded = run.learner.sharding == "full" and self.ranks.size > 1
        self._writer = CheckpointWriter(directory, run.checkpoint, self.ranks, together=self._sharded)
        self.version = 0
        self.lineage = 0
        """Of the weights from now on: the controller's HelloAck decides it (`begin`)."""
        self.resumed_from: WeightsId | None = None
        if self.ranks.rank == 0:
            checkpoint.remove_partial(directory)
        found = checkpoint.latest(directory)
        source = run.model if found is None else Model(path=str(found[0]))
        self.tokenizer = load_tokenizer(source)
        lora = run.learner.lora
        with checkpoint.no_progress_bars():
            base = source if lora is None else run.model
            self.model = build_model(base, seed=run.seed, dtype=torch.float32)
        self.layout: Layout = wire_layout(run, self.model)
        self.attention_share = attention_share(self.model.config, self.model.num_parameters())
        """See models.flops."""
        self._adapters: Adapters | None = None
        if lora is not None:
            self._adapters = add_adapters(self.model, lora, seed=run.seed, base=run.model.path)
            if found is not None:
                load_adapters(self.model, found[0] / FOLDER)
        policy = PackedPolicy(self.model, temperature=run.rollout.temperature, dtype=run.learner.dtype)
        if run.learner.compile:
            policy.fuse()
        if run.learner.activation_checkpointing:
            policy.recompute_layers()
        if self._sharded:
            policy.shard(self.ranks)
        elif not run.colocated:  # else it starts off the device
            self.model.to(self.ranks.device)  # pyright: ignore[reportArgumentType]
        self._optimisation = Optimisation(policy.parameters(), run.optimizer, run.steps, self.ranks)
        objective, resumed = build_objective(run), None if found is None else found[0]
        self._policy = policy
        with checkpoint.no_progress_bars():
            self.roles = Roles(run, objective, self.ranks, self.tokenizer, resumed)
        self.parts = [Part("", self.model, self._optimisation.optimizer, self._adapters), *self.roles.parts()]
        """What checkpoints hold."""
        self.offload = Offload([Resident(policy, self._optimisation), *self.roles.residents()], self.ranks.device)
        """For who shares the device with a generator."""
        self._step = TrainStep(run, policy, self._optimisation, objective, self.ranks, self.roles)
        if found is None:
            torch.manual_seed(run.seed)
        else:
            path, position = found
            checkpoint.restore(path, self.parts, self.ranks)
            self.version, self.lineage = position.version, position.lineage
            self.roles.kl_coefficient.restore(position.kl_coef)
            self.resumed_from = WeightsId(position.lineage, position.version)

    @property
    def weights(self) -> WeightsId:
        return WeightsId(self.lineage, self.version)

    def begin(self, lineage: int) -> None:
        """Train under this lineage from now on."""
        self.lineage = lineage

    def train(
        self, batch: MicroBatches, abandon: Callable[[], bool] = never, last_begins: Callable[[], None] = ignored
    ) -> dict[str, float]:
        """One optimiser step; the version is one higher afterwards, also where the step was skipped.

        last_begins: called when the last micro-batch begins, on the thread that trains.

        Returns numbers for metrics.jsonl; those of a skipped, non-finite step may be NaN.

        Raises:
            ProtocolError: the batch is not that of the next step, or breaks the wire contract.
            optimisation.Abandoned: `abandon` said so; version and weights are as before.
        """
        if self.ranks.size > 1 and self.ranks.rank == 0:
            self.ranks.broadcast_bytes(commands.encode(commands.Train(batch)))
        started = time.monotonic()
        if batch.step != self.version:
            raise ProtocolError(f"the batch of step {batch.step} came, the learner is at version {self.version}")
        metrics = self._step(flatten(batch, self.ranks.size), abandon, last_begins)
        trim_heap()
        self.version += 1
        self.roles.after_step(self._policy, self.version)
        if not self._measured and self.ranks.rank == 0:
            self._measured = True
            self._run_directory.path.mkdir(parents=True, exist_ok=True)
            write_json(self._run_directory.memory, self.memory())
        return metrics | {"train_s": time.monotonic() - started}

    def memory(self) -> Holdings:
        """See learner.memory; written to memory.json after the first step."""
        return holdings(self._policy, self._optimisation.optimizer, self.roles)

    def snapshot(self, out: Tensor) -> None:
        """Rank 0: copy the weights into `out` ([layout.nbytes] uint8), as the wire wants them; `Publisher.publish`
        calls it."""
        if self._sharded:
            self.ranks.broadcast_bytes(commands.encode(commands.Snapshot()))
        self.layout.pack(self._whole_weights(), out)

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        if self._adapters is not None:  # merged in full precision, then cast
            return self._adapters.merged(gathered(named, self.ranks))
        return gathered(named, self.ranks, self.layout.entries[0].dtype)

    def begin_checkpoint(self) -> Future[Path]:
        """Rank 0: copy everything, then write it in the background. The future is done when it is durable.

        Raises:
            UserError: the former checkpoint could not be written, or takes too long.
        """
        position = checkpoint.Position(
            self.version, self.lineage, self.version, self._run.seed, kl_coef=self.roles.kl_coefficient.saved
        )

        def take() -> checkpoint.Content:
            if self._sharded and self.ranks.rank == 0:
                self.ranks.broadcast_bytes(commands.encode(commands.Save(self.lineage)))
            return checkpoint.take(position, self.parts, self.tokenizer, self.ranks)

        return self._writer.begin(self.version, take)

    def evaluated(self, version: int, reward: float) -> None:
        """What these weights reached on held-out tasks. From any thread."""
        self._writer.evaluated(version, reward)

    def save_checkpoint(self) -> Path:
        """`begin_checkpoint`, and wait for it."""
        return self.begin_checkpoint().result()

    def keep_alive(self) -> None:
        """Rank 0, while it waits for a batch: at least every few minutes, so that the other ranks know it lives."""
        self.ranks.broadcast_bytes(b"")

    def follow(self) -> None:
        """Ranks above 0: train on what rank 0 passes on, until it closes.

        Raises:
            distributed.RanksDisagree: rank 0 is silent or gone.
        """
        while True:
            match commands.decode(self.ranks.broadcast_bytes(None)):
                case commands.Train(batch):
                    with contextlib.suppress(ProtocolError, Abandoned):  # rank 0 sees the same, and decides
                        self.train(batch)
                case commands.Snapshot():
                    for _ in self._whole_weights():
                        pass
                case commands.Save(lineage):
                    self.lineage = lineage
                    self.begin_checkpoint()
                case commands.Stop():
                    return
                case None:  # a keep-alive
                    pass

    def close(self) -> None:
        """Finish a checkpoint that is being written, let the other ranks go and leave torch.distributed."""
        self._writer.close()
        if self.ranks.size > 1 and self.ranks.rank == 0:
            self.ranks.broadcast_bytes(commands.encode(commands.Stop()))
        if self._owns_ranks:
            self.ranks.stop()


def build_objective(run: Run) -> Objective:
    """Raises UserError naming the preset or the option."""
    try:
        objective = preset(run.algorithm.preset, **run.algorithm.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"algorithm: {error}") from None
    least = ADAPTIVE_KL_CLIP * run.step_rollouts
    if objective.kl_target is not None and objective.kl_horizon <= least:
        raise UserError(
            f"algorithm: kl_horizon = {objective.kl_horizon!r}: one step of {run.step_rollouts} rollouts could turn "
            f"kl_coef negative; write more than {least:g}"
        )
    return objective
