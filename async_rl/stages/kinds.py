"""From a recipe to the trainer of its kind, with the models it needs and no others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.scalar import PackedScalar
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer
from async_rl.stages.config import StageRecipe
from async_rl.stages.data import StageData, load_references
from async_rl.stages.directory import StageDirectory
from async_rl.stages.distill import Distillation
from async_rl.stages.preference import PreferenceTrainer
from async_rl.stages.reference import PerStep, Reference, cached
from async_rl.stages.reward_model import RewardModelTrainer
from async_rl.stages.rows import Pair
from async_rl.stages.sampler import Sampler
from async_rl.stages.sft import SFT
from async_rl.stages.trainer import Trainer

REFERENCE_FILE = "reference.safetensors"


def build_trainer(
    recipe: StageRecipe,
    source: Model,
    data: StageData,
    directory: StageDirectory,
    ranks: Ranks,
    stopping: Callable[[], bool],
) -> Trainer:
    """source: of the trained model; the recipe's, or the checkpoint from which the stage continues.

    Raises:
        UserError: a model is not there, or does not fit the others.
        optimisation.Abandoned: it was asked to stop while the reference was computed.
    """
    dtype, cap = recipe.learner.dtype, recipe.learner.microbatch_tokens
    match recipe.stage.kind:
        case "preference":
            reference = _reference(recipe, data, directory, ranks, stopping)
            policy = _policy(source, recipe, ranks)
            return PreferenceTrainer(policy, ranks.device, recipe.preference, reference)
        case "reward-model":
            with checkpoint.no_progress_bars():
                scalar = PackedScalar.load(source, seed=recipe.seed, dtype=dtype)
            _prepare(scalar, recipe, ranks)
            margins = [value.margin if isinstance(value, Pair) else 0.0 for value in data.values]
            return RewardModelTrainer(scalar, ranks, margins, lambda: load_references(recipe), cap=cap)
        case "distill":
            return _distillation(recipe, source, ranks)
        case _:
            return SFT(_policy(source, recipe, ranks), ranks.device)


def _reference(
    recipe: StageRecipe, data: StageData, directory: StageDirectory, ranks: Ranks, stopping: Callable[[], bool]
) -> Reference | None:
    """Built before the trained model, so that with cached log-probs the two are never in memory together."""
    preference, dtype = recipe.preference, recipe.learner.dtype
    if preference.loss == "simpo":
        return None
    path = preference.reference_path
    source, field = (Model(path=path), "preference.reference_path") if path else (recipe.model, "model.path")

    def build() -> PreTrainedModel:
        _same_vocabulary(recipe, source, field)
        return _model(source, recipe, field)

    sharded = is_sharded(recipe, ranks)
    if preference.reference == "per_step":
        return PerStep(build(), ranks, dtype=dtype, sharded=sharded)
    file, cap = directory.path / REFERENCE_FILE, recipe.learner.microbatch_tokens
    return cached(file, build, data.examples, ranks, dtype=dtype, sharded=sharded, cap=cap, stopping=stopping)


def _distillation(recipe: StageRecipe, source: Model, ranks: Ranks) -> Trainer:
    distill, teacher, sampler = recipe.distill, None, None
    if distill.teacher and (distill.loss == "kl" or distill.responses == "teacher"):
        path, field = Model(path=distill.teacher), "distill.teacher"
        _same_vocabulary(recipe, path, field)
        teacher = PackedPolicy(_model(path, recipe, field), dtype=recipe.learner.dtype)
    if distill.responses != "data":
        speaker = source if distill.responses == "student" else Model(path=distill.teacher)
        sampler = Sampler(recipe.generator, load_config(speaker), load_stop_tokens(speaker))
    student = _policy(source, recipe, ranks)
    return Distillation(recipe, student, teacher, sampler, ranks, sharded=is_sharded(recipe, ranks))


def is_sharded(recipe: StageRecipe, ranks: Ranks) -> bool:
    return recipe.learner.sharding == "full" and ranks.size > 1


def _policy(source: Model, recipe: StageRecipe, ranks: Ranks) -> PackedPolicy:
    """What is trained."""
    policy = PackedPolicy(_model(source, recipe), dtype=recipe.learner.dtype)
    _prepare(policy, recipe, ranks)
    return policy


def _prepare(trained: PackedPolicy | PackedScalar, recipe: StageRecipe, ranks: Ranks) -> None:
    """As [learner] says: in place, and on this rank's device."""
    if recipe.learner.compile:
        trained.fuse()
    if recipe.learner.activation_checkpointing:
        trained.recompute_layers()
    if is_sharded(recipe, ranks):
        trained.shard(ranks)
    else:
        trained.to(ranks.device)


def _model(source: Model, recipe: StageRecipe, field: str = "model.path") -> PreTrainedModel:
    with checkpoint.no_progress_bars():
        return build_model(source, seed=recipe.seed, dtype=torch.float32, field=field)


def _same_vocabulary(recipe: StageRecipe, other: Model, field: str) -> None:
    ours, theirs = load_tokenizer(recipe.model), load_tokenizer(other, field=field)
    if ours.get_vocab() != theirs.get_vocab():
        raise UserError(f"{field} = {other.path!r}: its tokenizer has another vocabulary than the trained model's")
