"""The loop of every stage that trains: rows of a step -> plan over ranks -> packed micro-batches -> one update.

    directory = StageDirectory(Path("runs/sft"))
    complete = run(recipe, directory, tell)     # False: stopped; the same call goes on from there

Every rank runs this; the first one writes. What a step trains on is a function of the recipe, the data and its number
(stages.schedule), and weights, optimiser and generators are in the checkpoint: a stage that was stopped and continued
ends with the same weights, bit for bit on one rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import msgspec
import torch

from async_rl.batching.plan import plan
from async_rl.config import Model
from async_rl.learner import checkpoint
from async_rl.learner.checkpoint import Position
from async_rl.learner.checkpoint_writer import CheckpointWriter
from async_rl.learner.distributed import Ranks, choose_device
from async_rl.learner.optimisation import Abandoned, Optimisation, Totals
from async_rl.learner.saved_parts import Part
from async_rl.learner.sharding import spread
from async_rl.models.flops import attention_share
from async_rl.models.loading import load_tokenizer
from async_rl.models.memory import trim_heap
from async_rl.models.precision import settle_section
from async_rl.stages import merge
from async_rl.stages.config import StageRecipe
from async_rl.stages.data import load_data
from async_rl.stages.directory import Row, StageDirectory, StageJournal, Tell, nothing
from async_rl.stages.interruption import interruptible
from async_rl.stages.kinds import build_trainer, is_sharded
from async_rl.stages.result import write_model
from async_rl.stages.schedule import Schedule
from async_rl.stages.trainer import Batch
from async_rl.telemetry.exporters import exporters

EVALUATION = -1
"""As a step: what is sampled for an evaluation is the same at every one of them."""


def run(recipe: StageRecipe, directory: StageDirectory, tell: Tell) -> bool:
    """To the end. Returns False when it was stopped before; the directory is held by who calls.

    Raises:
        UserError: data, model, device or recipe are wrong.
    """
    learner, generator = settle_section(recipe.learner), settle_section(recipe.generator)
    recipe = msgspec.structs.replace(recipe, learner=learner, generator=generator)
    if recipe.stage.kind == "merge":
        return merge.run(recipe, directory, tell)
    ranks = Ranks.start(choose_device(recipe.learner.device))
    try:
        with interruptible() as asked_to_stop:
            stage = StageRun(recipe, directory, ranks, tell, asked_to_stop)
            try:
                return stage.to_the_end()
            finally:
                stage.close()
    finally:
        ranks.stop()


class StageRun:
    """The state between two steps."""

    def __init__(
        self,
        recipe: StageRecipe,
        directory: StageDirectory,
        ranks: Ranks,
        tell: Tell = nothing,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ranks, self._recipe, self._directory, self._stopping = ranks, recipe, directory, asked_to_stop
        first = ranks.rank == 0
        self.tokenizer = load_tokenizer(recipe.model)
        self.data = load_data(recipe)
        if first:
            directory.keep_data(self.data.files)
            checkpoint.remove_partial(directory.files.checkpoints)
        found = checkpoint.latest(directory.files.checkpoints)
        source = recipe.model if found is None else Model(path=str(found[0]))
        self.trainer = build_trainer(recipe, source, self.data, directory, ranks, asked_to_stop)
        model = self.trainer.model
        self._sharded = is_sharded(recipe, ranks)
        self._writer = CheckpointWriter(directory.files.checkpoints, recipe.checkpoint, ranks, together=self._sharded)
        schedule = self._schedule()
        self.steps, self._batches = schedule.count(), schedule.batches()
        self.optimisation = Optimisation(model.parameters(), recipe.optimizer, self.steps, ranks)
        self._parts = [Part("", model, self.optimisation.optimizer)]
        self.step = 0
        if found is None:
            torch.manual_seed(recipe.seed)
        else:
            path, position = found
            checkpoint.restore(path, self._parts, ranks)
            self.step = position.version
        trackers = exporters(recipe, directory.path) if first else []
        self.journal = StageJournal(directory, tell if first else nothing, trackers, silent=not first)
        self.journal.rewind(self.step)
        for row in self.journal.evaluations:
            self._rank(row)
        self._share = attention_share(model.config, model.num_parameters())
        self._started = time.monotonic() - (self.journal.rows[-1]["wall_s"] if self.journal.rows else 0.0)
        self._saved = self.step if found is not None else -1

    def to_the_end(self) -> bool:
        """Train what is left, evaluate, save. Returns False when it was asked to stop."""
        if self.data.dropped:
            self.journal.say(f"{self.data.dropped} rows are too long and left out (stage.too_long = 'drop')")
        every = self._recipe.checkpoint.every_steps
        try:
            if self.step == 0 or self._evaluates():  # it may have been stopped in the middle of that
                self.evaluate()
            for rows in islice(self._batches, self.step, self.steps):
                self.train(rows)
                if self._evaluates():
                    self.evaluate()
                if self.step % every == 0:
                    self.save()
            self.evaluate()
        except Abandoned:
            self.save()
            self._writer.wait()
            self.journal.say(f"stopped after step {self.step} of {self.steps}: the same command continues")
            return False
        self.save()
        self._writer.wait()
        self._finish()
        return True

    def close(self) -> None:
        """A checkpoint that is being written is finished, an engine that samples is stopped, trackers have it all."""
        self._writer.close()
        self.trainer.close()
        self.journal.close()

    def train(self, rows: Sequence[int]) -> None:
        """One optimiser step on these rows of the data.

        Raises:
            Abandoned: it was asked to stop; no weight has changed.
        """
        began = time.monotonic()
        batch = self.trainer.batch(Batch(self.data.examples, rows), self.step)
        totals = self._pass(batch)
        row: Row = {"step": self.step, "version": self.step + 1, "loss": totals.loss, "grad_norm": totals.grad_norm}
        row |= self.trainer.metrics(batch, {**totals.values, "loss": totals.loss})
        row |= self.optimisation.update(self.step, totals)
        trim_heap()
        self.step += 1
        now = time.monotonic()
        row |= {"rows": len(batch.rows), "tokens": batch.trained_tokens, "tokens_read": batch.read_tokens}
        row["steps"] = self.steps
        row |= {"tokens_per_s": batch.read_tokens / (now - began), "wall_s": now - self._started}
        self.journal.step(row)

    def evaluate(self) -> None:
        """The held-out rows under the weights of now, unless that was done before the stage was stopped.

        Raises:
            Abandoned: it was asked to stop.
        """
        if not self.data.heldout or any(row["version"] == self.step for row in self.journal.evaluations):
            return
        with torch.no_grad():
            batch = self.trainer.batch(Batch(self.data.examples, self.data.heldout), EVALUATION)
            try:
                totals = self._pass(batch)
            finally:
                spread(self.trainer.module)  # a checkpoint may be next: of what the optimiser knows
        metrics = self.trainer.metrics(batch, {**totals.values, "loss": totals.loss})
        row: Row = {"version": self.step, "rows": len(batch.rows), "loss": totals.loss, **metrics}
        self.journal.evaluated(row)
        self._rank(row)

    def save(self) -> None:
        """A checkpoint of now, unless there is one; it is written while training goes on."""
        if self._saved == self.step or (self.ranks.rank > 0 and not self._sharded):
            return
        position = Position(self.step, 0, self.step, self._recipe.seed)
        take = partial(checkpoint.take, position, self._parts, self.tokenizer, self.ranks)
        self._writer.begin(self.step, take)
        self._saved = self.step

    def _evaluates(self) -> bool:
        """Whether the recipe asks for an evaluation now, in the middle."""
        every = self._recipe.stage.evaluate_every
        return every > 0 and self.step % every == 0 and self.step < self.steps

    def _rank(self, evaluation: Row) -> None:
        """For checkpoint.keep_best: the lower the loss of the held-out rows, the better."""
        loss = evaluation["loss"]
        self._writer.evaluated(evaluation["version"], -loss if math.isfinite(loss) else -math.inf)

    def _pass(self, batch: Batch) -> Totals:
        """Every micro-batch of a step or an evaluation, shared out over the ranks; no weight changes."""
        lengths, cap = batch.examples.tokens_of(batch.rows), self._recipe.learner.microbatch_tokens
        planned = plan(lengths, ranks=self.ranks.size, cap=cap, quadratic=self._share)
        parts = [[batch.rows[place] for place in places] for places in planned[self.ranks.rank]]
        losses = [partial(self.trainer.loss, batch, part) for part in parts]
        return self.optimisation.accumulate(losses, self._stopping)

    def _finish(self) -> None:
        added = self.trainer.finish(Batch(self.data.examples, self.data.train))
        write_model(self._directory.model, self.trainer.model, self.tokenizer, self.ranks)
        evaluations, rows = self.journal.evaluations, self.journal.rows
        stage = self._recipe.stage
        self.journal.summary(
            {
                "stage": stage.kind,
                "asked": {"steps": stage.steps, "epochs": stage.epochs},
                "steps": self.steps,
                "wall_s": rows[-1]["wall_s"] if rows else 0.0,
                "loss_first": rows[0]["loss"] if rows else None,
                "loss_last": rows[-1]["loss"] if rows else None,
                "eval_before": _plain(evaluations[0]) if evaluations else None,
                "eval_after": _plain(evaluations[-1]) if evaluations else None,
                "rows": sum(row["rows"] for row in rows),
                "tokens": sum(row["tokens"] for row in rows),
                "dropped": self.data.dropped,
                "best": self._best(),
                "model": str(self._directory.model),
                **added,
            }
        )

    def _best(self) -> Row | None:
        """The saved model with the lowest loss on the held-out rows, where such are kept."""
        if not self._recipe.checkpoint.keep_best:
            return None
        saved = {int(path.name[1:]): path for path in checkpoint.checkpoints(self._directory.files.checkpoints)}
        of_saved = [row for row in self.journal.evaluations if row["version"] in saved]
        row = min(of_saved, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
        return _plain(row) | {"checkpoint": str(saved[row["version"]])}

    def _schedule(self) -> Schedule:
        """Over the training rows; its numbers are rows of the data."""
        stage, lengths = self._recipe.stage, self.data.examples.tokens_of(range(len(self.data.examples)))
        sizes = {"batch_rows": stage.batch_rows, "batch_tokens": stage.batch_tokens}
        return Schedule(
            rows=self.data.train,
            tokens_N=lengths,
            seed=self._recipe.seed,
            steps=stage.steps,
            epochs=stage.epochs,
            **sizes,
        )


def _plain(evaluation: Row) -> Row:
    return {name: value for name, value in evaluation.items() if name not in ("timestamp", "version")}
