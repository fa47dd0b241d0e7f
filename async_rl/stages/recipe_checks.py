"""What types do not express of a stage's recipe: bounds, and what its kind does not read.

A UserError names the field, the value and what to write instead. An option that would do nothing is an error too.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import msgspec

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.recipe_checks import check_optimizer, check_signs, demand
from async_rl.stages.config import Kind, Stage, StageRecipe

POSITIVE = (
    "learner.microbatch_tokens",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "generator.slots",
    "preference.beta",
    "distill.max_new_tokens",
    "distill.temperature",
)
"""What has to be above 0, where it is set."""
NOT_NEGATIVE = (
    "seed",
    "stage.heldout_rows",
    "stage.epochs",
    "stage.steps",
    "stage.batch_rows",
    "stage.batch_tokens",
    "stage.max_tokens",
    "stage.evaluate_every",
    "checkpoint.keep_best",
    "generator.max_length",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
    "optimizer.warmup_steps",
    "optimizer.decay_steps",
    "optimizer.final_rate",
    "preference.gamma",
)
"""What has to be 0 or more, where it is set."""
SECTION: dict[Kind, str] = {
    "preference": "preference",
    "reward-model": "reward_model",
    "distill": "distill",
    "merge": "merge",
}
"""The section that only this kind reads."""
SAMPLING = ("engine", "count", "queued_rollouts", "sglang")
"""Fields of [generator] that an engine inside a stage has no use for."""


def check(recipe: StageRecipe) -> None:
    """Raises UserError."""
    check_signs(recipe, positive=POSITIVE, not_negative=NOT_NEGATIVE)
    smoothing, alpha = recipe.preference.label_smoothing, recipe.merge.alpha
    demand(0 <= smoothing < 0.5, "preference.label_smoothing", smoothing, "write a share from 0 to below 0.5")
    demand(0 <= alpha <= 1, "merge.alpha", alpha, "write a number from 0 to 1")
    defaults = StageRecipe(stage=Stage(kind=recipe.stage.kind))
    for field, reason in _unread(recipe):
        found = _first_change(field, attrgetter(field)(recipe), attrgetter(field)(defaults))
        if found is not None:
            raise UserError(f"{found[0]} = {found[1]!r}: {reason}")
    if recipe.stage.kind == "merge":
        demand(bool(recipe.merge.a and recipe.merge.b), "merge", "one model", "write the directories a and b")
        demand(recipe.model == Model(), "model", recipe.model.path or "tiny", "leave it out: merge.a and merge.b")
        return
    check_optimizer("optimizer", recipe.optimizer)
    _on_what(recipe)
    _evaluations(recipe)
    if recipe.stage.kind == "distill":
        _distill(recipe)


def _unread(recipe: StageRecipe) -> Iterator[tuple[str, str]]:
    """Fields and sections that have to be left at their defaults, and why."""
    stage, preference, distill = recipe.stage, recipe.preference, recipe.distill
    kind = stage.kind
    not_read = f"stage.kind = {kind!r} does not read it: leave it out"
    for other, section in SECTION.items():
        if kind != other:
            yield section, not_read
    if kind == "merge":
        names = [f.name for f in msgspec.structs.fields(Stage) if f.name != "kind"]
        fields = ("optimizer", "learner", "checkpoint", "generator", "report_to", *(f"stage.{n}" for n in names))
        yield from ((field, not_read) for field in fields)
        return
    if kind != "sft":
        yield "stage.train_on", not_read
    if stage.template == "chat":
        yield "stage.prompt_format", "stage.template = 'chat' does not read it: leave it out, or write plain"
    if kind == "distill" and distill.responses != "data":
        reason = "a stage samples with one embedded engine in its own process: leave it out"
        yield from ((f"generator.{name}", reason) for name in SAMPLING)
    else:
        yield "generator", "only a distillation that samples reads it: leave it out"
    only = {"gamma": ("simpo",), "label_smoothing": ("dpo", "dpo_norm", "simpo"),
            "reference": ("dpo", "dpo_norm", "ipo"), "reference_path": ("dpo", "dpo_norm", "ipo")}  # fmt: skip
    for name, losses in only.items():
        if preference.loss not in losses:
            yield f"preference.{name}", f"only {', '.join(losses)} use it"
    if distill.loss == "cross_entropy":
        yield "distill.direction", "only distill.loss = 'kl' has one: leave it out"
        if distill.responses == "data":
            yield from ((f"distill.{name}", "cross-entropy on responses of the data does not read it: leave it out")
                        for name in ("teacher", "temperature"))  # fmt: skip
    if distill.responses == "data":
        yield "distill.max_new_tokens", "distill.responses = 'data' samples nothing: leave it out"
    yield "learner.ranks", "leave it out: a stage runs on as many ranks as torchrun starts"
    yield "learner.lora", "a stage trains all weights: leave it out"


def _first_change(field: str, value: Any, default: Any) -> tuple[str, Any] | None:
    """The first field below this one that is not at its default, and its value."""
    if value == default:
        return None
    if isinstance(value, msgspec.Struct) and isinstance(default, msgspec.Struct):
        for one in msgspec.structs.fields(value):
            found = _first_change(f"{field}.{one.name}", getattr(value, one.name), getattr(default, one.name))
            if found is not None:
                return found
    return field, msgspec.to_builtins(value)


def _on_what(recipe: StageRecipe) -> None:
    stage = recipe.stage

    def one_of(first: str, second: str) -> None:
        values = {name: getattr(stage, name) for name in (first, second)}
        given = [f"stage.{name}" for name, value in values.items() if value]
        demand(len(given) == 1, " and ".join(given) or f"stage.{first}", values, f"set one of {first} and {second}")

    one_of("epochs", "steps")
    one_of("batch_rows", "batch_tokens")
    demand(stage.train != "", "stage.train", stage.train, "write the path of a file of JSON lines")
    both = bool(stage.heldout and stage.heldout_rows)
    demand(not both, "stage.heldout_rows", stage.heldout_rows, "leave it out: stage.heldout names a file")
    demand("{prompt}" in stage.prompt_format, "stage.prompt_format", stage.prompt_format, "it needs {prompt}")
    one_model = (recipe.model.path != "") != (recipe.model.tiny is not None)
    demand(one_model, "model", recipe.model.path or "nothing", "set exactly one of path and tiny")


def _evaluations(recipe: StageRecipe) -> None:
    stage, every, best = recipe.stage, recipe.checkpoint.every_steps, recipe.checkpoint.keep_best
    heldout = bool(stage.heldout or stage.heldout_rows)
    for field, value in (("stage.evaluate_every", stage.evaluate_every), ("checkpoint.keep_best", best)):
        demand(heldout or not value, field, value, "set stage.heldout or stage.heldout_rows, or write 0")
    if best:
        demand(
            stage.evaluate_every > 0 and every % stage.evaluate_every == 0,
            "stage.evaluate_every",
            stage.evaluate_every,
            f"checkpoint.keep_best needs an evaluation of every checkpoint: write {every} or a divisor of it",
        )


def _distill(recipe: StageRecipe) -> None:
    distill = recipe.distill
    needs = distill.loss == "kl" or distill.responses == "teacher"
    demand(bool(distill.teacher) or not needs, "distill.teacher", "", "write the directory of the teacher")
    demand(
        distill.loss == "kl" or distill.responses != "student",
        "distill.loss",
        distill.loss,
        "cross-entropy on the student's own samples teaches nothing; write kl, or responses = 'teacher' or 'data'",
    )
