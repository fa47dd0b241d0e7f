"""What the recipe of a stage beside RL says: SFT, preference, reward model, distillation, merge.

[model], [optimizer], [learner], [checkpoint] and [generator] are those of an RL recipe (async_rl.config); [stage] says
on what and for how long, and a section of its own holds what only one kind has.

recipe.py reads them from TOML, recipe_checks.py knows what does not go together.
"""

from __future__ import annotations

import typing
from typing import Literal, TypeAlias

import msgspec

from async_rl.config import Checkpoint, Generator, Learner, Model, Optimizer, Tracker

Kind: TypeAlias = Literal["sft", "preference", "reward-model", "distill", "merge"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On what, and for how long. The order of the rows depends on `seed` and the epoch alone."""

    kind: Kind
    train: str = ""
    """JSON lines (docs/stages.md says which fields); relative to the recipe."""
    heldout: str = ""
    """JSON lines that are never trained on."""
    heldout_rows: int = 0
    """Without a file: so many rows of `train` are set apart, chosen by `seed`."""
    epochs: float = 0.0
    steps: int = 0
    """Optimiser steps; exactly one of epochs and steps."""
    batch_rows: int = 0
    """Rows of one optimiser step, over all ranks; exactly one of batch_rows and batch_tokens."""
    batch_tokens: int = 0
    """Or tokens: as many rows, in order, as fit."""
    max_tokens: int = 0
    """Of one sequence, prompt and response; 0 = what the model and learner.microbatch_tokens allow."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a row that is longer: stop and name it, or leave it out and count it. Nothing is ever cut."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template, as in RL. plain: `prompt_format`, the response, EOS. auto: chat where the
    tokenizer has a template."""
    prompt_format: str = "{prompt}"
    """plain: what the model reads before the response."""
    train_on: Literal["last", "assistant"] = "last"
    """Of a conversation: its last assistant turn, or all of them."""
    evaluate_every: int = 0
    """Also every so many steps; held-out rows are evaluated before and after training in any case."""


class Preference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """algorithms.preference has the formulae."""

    loss: Literal["dpo", "dpo_norm", "simpo", "ipo"] = "dpo"
    beta: float | None = None
    """Default: dpo 0.1, dpo_norm 5, simpo 2, ipo 0.1."""
    gamma: float | None = None
    """simpo only: the margin to reach; default half of beta, as the authors found good."""
    label_smoothing: float = 0.0
    """dpo, dpo_norm, simpo: the share of pairs whose labels are taken to be wrong (cDPO)."""
    reference: Literal["cached", "per_step"] = "cached"
    """cached: log-probs of the reference are computed once, before training, and the model is let go. per_step: it
    stays in memory."""
    reference_path: str = ""
    """A model directory; default: the model that is trained, as it was at the start."""


class RewardModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """algorithms.reward_model has the formulae."""

    references: str = ""
    """JSON lines with prompt and response whose mean score becomes 0; default: the best answers of `train`."""


class Distill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """algorithms.distillation has the formulae."""

    teacher: str = ""
    """A model directory of the same vocabulary; not needed for cross-entropy on responses of the data."""
    responses: Literal["data", "teacher", "student"] = "student"
    """Whose text is trained on: of the rows, or sampled at every step from the teacher, or from the student
    (on-policy)."""
    loss: Literal["cross_entropy", "kl"] = "kl"
    direction: Literal["reverse", "forward"] = "reverse"
    """reverse = KL(student || teacher), forward = KL(teacher || student)."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    """Of sampling, and of both distributions in the KL."""


class Merge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """alpha * a + (1 - alpha) * b of every weight."""

    a: str = ""
    """A model directory; its config and tokenizer are those of the result."""
    b: str = ""
    alpha: float = 0.5


class StageRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole recipe."""

    stage: Stage
    model: Model = Model()
    seed: int = 1
    optimizer: Optimizer = Optimizer()
    learner: Learner = Learner()
    checkpoint: Checkpoint = Checkpoint()
    generator: Generator = Generator()
    """Of the engine that samples for distillation: slots, max_length, dtype, device."""
    preference: Preference = Preference()
    reward_model: RewardModel = RewardModel()
    distill: Distill = Distill()
    merge: Merge = Merge()
    report_to: list[Tracker] = []
    """Where metrics go besides metrics.jsonl; each needs its package."""


BETA = {"dpo": 0.1, "dpo_norm": 5.0, "simpo": 2.0, "ipo": 0.1}
