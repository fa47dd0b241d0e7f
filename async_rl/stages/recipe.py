"""The recipe of a stage beside RL: SFT, preference, reward model, distillation, merge.

    recipe = load(Path("recipes/stages/sort_sft.toml"), "sft", ["stage.steps=20"])

[model], [optimizer], [learner], [checkpoint] and [generator] are those of an RL recipe (async_rl.config); [stage] says
on what and for how long, and a section of its own holds what only one kind has.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from async_rl import recipes, tables
from async_rl.config import Checkpoint, Generator, Learner, Model, Optimizer
from async_rl.errors import UserError

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


SECTION: dict[Kind, str] = {
    "preference": "preference",
    "reward-model": "reward_model",
    "distill": "distill",
    "merge": "merge",
}
"""The section that only this kind reads."""
PATHS = [
    ("model", "path"),
    ("stage", "train"),
    ("stage", "heldout"),
    ("preference", "reference_path"),
    ("reward_model", "references"),
    ("distill", "teacher"),
    ("merge", "a"),
    ("merge", "b"),
]
BETA = {"dpo": 0.1, "dpo_norm": 5.0, "simpo": 2.0, "ipo": 0.1}


def load(path: Path, kind: Kind, overrides: typing.Sequence[str] = ()) -> StageRecipe:
    """Read a recipe for `async-rl stage KIND`, apply overrides, check every field.

    Raises:
        UserError: naming the field, the value and what to write instead.
    """
    table = recipes.read_table(path, overrides, _resolve)
    if "stage" not in table:
        raise UserError(f"recipe {path}: it has no [stage] section; `async-rl train` runs a recipe of RL")
    named = table["stage"].get("kind") if isinstance(table["stage"], dict) else None
    if named in KINDS and named != kind:
        raise UserError(f"stage.kind = {named!r}: run it with `async-rl stage {named} {path}`")
    recipe = from_table(table)
    recipes.check_model_directory("model", recipe.model.path)
    for section, key in PATHS[1:]:
        named = getattr(getattr(recipe, section), key)
        if named and not Path(named).exists():
            raise UserError(f"{section}.{key} = {named!r}: there is no such file or directory")
    return recipe


def from_table(table: dict[str, Any]) -> StageRecipe:
    """A checked recipe from plain tables. Raises UserError as `load` does."""
    recipe = tables.convert(table, StageRecipe)
    for kind, section in SECTION.items():
        if section in table and kind != recipe.stage.kind and getattr(recipe, section) != _default(section):
            raise UserError(f"{section}: stage.kind = {recipe.stage.kind!r} does not read it; leave the section out")
    _check_numbers(recipe)
    if recipe.stage.kind == "merge":
        _demand(bool(recipe.merge.a and recipe.merge.b), "merge", "one model", "write the directories a and b")
        _demand(recipe.model == Model(), "model", recipe.model.path or "tiny", "leave it out: merge.a and merge.b")
    else:
        _check_training(recipe)
    return recipe


def _default(section: str) -> msgspec.Struct:
    made: msgspec.Struct = {field.name: field for field in msgspec.structs.fields(StageRecipe)}[section].default
    return made


def _resolve(table: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe absolute."""
    for section, key in PATHS:
        inner = table.get(section)
        path = typing.cast(dict[str, Any], inner).get(key) if isinstance(inner, dict) else None
        if isinstance(path, str) and path:
            typing.cast(dict[str, Any], inner)[key] = str((folder / path).resolve())


def _demand(holds: bool, field: str, value: object, instead: str) -> None:
    if not holds:
        raise UserError(f"{field} = {value!r}: {instead}")


def _check_numbers(recipe: StageRecipe) -> None:
    stage, optimizer, preference = recipe.stage, recipe.optimizer, recipe.preference
    positive: list[tuple[str, float]] = [
        ("learner.microbatch_tokens", recipe.learner.microbatch_tokens),
        ("checkpoint.every_steps", recipe.checkpoint.every_steps),
        ("checkpoint.keep", recipe.checkpoint.keep),
        ("generator.slots", recipe.generator.slots),
        ("preference.beta", 1.0 if preference.beta is None else preference.beta),
        ("distill.max_new_tokens", recipe.distill.max_new_tokens),
        ("distill.temperature", recipe.distill.temperature),
    ]
    for field, value in positive:
        _demand(value > 0, field, value, "write a number above 0")
    for field, value in [
        ("seed", recipe.seed),
        ("stage.heldout_rows", stage.heldout_rows),
        ("stage.epochs", stage.epochs),
        ("stage.steps", stage.steps),
        ("stage.batch_rows", stage.batch_rows),
        ("stage.batch_tokens", stage.batch_tokens),
        ("stage.max_tokens", stage.max_tokens),
        ("stage.evaluate_every", stage.evaluate_every),
        ("optimizer.learning_rate", optimizer.learning_rate),
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("optimizer.warmup_steps", optimizer.warmup_steps),
        ("optimizer.decay_steps", optimizer.decay_steps),
        ("optimizer.final_rate", optimizer.final_rate),
        ("preference.gamma", preference.gamma or 0.0),
    ]:
        _demand(value >= 0, field, value, "write 0 or more")
    smoothing, alpha = preference.label_smoothing, recipe.merge.alpha
    _demand(0 <= smoothing < 0.5, "preference.label_smoothing", smoothing, "write a share from 0 to below 0.5")
    _demand(0 <= alpha <= 1, "merge.alpha", alpha, "write a number from 0 to 1")


def _check_training(recipe: StageRecipe) -> None:
    stage, preference, distill = recipe.stage, recipe.preference, recipe.distill

    def one_of(first: str, second: str) -> None:
        values = {name: getattr(stage, name) for name in (first, second)}
        given = [f"stage.{name}" for name, value in values.items() if value]
        _demand(len(given) == 1, " and ".join(given) or f"stage.{first}", values, f"set one of {first} and {second}")

    one_of("epochs", "steps")
    one_of("batch_rows", "batch_tokens")
    _demand(stage.train != "", "stage.train", stage.train, "write the path of a file of JSON lines")
    both = bool(stage.heldout and stage.heldout_rows)
    _demand(not both, "stage.heldout_rows", stage.heldout_rows, "leave it out: stage.heldout names a file")
    one_model = (recipe.model.path != "") != (recipe.model.tiny is not None)
    _demand(one_model, "model", recipe.model.path or "nothing", "set exactly one of path and tiny")
    ranks = recipe.learner.ranks
    _demand(ranks == 1, "learner.ranks", ranks, "leave it out: a stage runs on as many ranks as torchrun starts")
    _demand("{prompt}" in stage.prompt_format, "stage.prompt_format", stage.prompt_format, "it needs {prompt}")
    only = [("gamma", preference.gamma is not None, ("simpo",)), ("label_smoothing", preference.label_smoothing > 0,
            ("dpo", "dpo_norm", "simpo")), ("reference_path", preference.reference_path != "", ("dpo", "dpo_norm",
            "ipo"))]  # fmt: skip
    for name, given, losses in only:
        value = getattr(preference, name)
        _demand(not given or preference.loss in losses, f"preference.{name}", value, f"only {', '.join(losses)} use it")
    if stage.kind == "distill":
        needs = distill.loss == "kl" or distill.responses == "teacher"
        _demand(bool(distill.teacher) or not needs, "distill.teacher", "", "write the directory of the teacher")
        _demand(
            distill.loss == "kl" or distill.responses != "student",
            "distill.loss",
            distill.loss,
            "cross-entropy on the student's own samples teaches nothing; write kl, or responses = 'teacher' or 'data'",
        )
