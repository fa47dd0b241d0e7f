"""A weighted average of two models' weights: `async-rl stage merge`. Only safetensors are read, tensor by tensor."""

from __future__ import annotations

import time

import torch

from async_rl.algorithms.merge import merge_weights
from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.stages.config import StageRecipe
from async_rl.stages.directory import StageDirectory, StageJournal, Tell
from async_rl.stages.result import write_model


def run(recipe: StageRecipe, directory: StageDirectory, tell: Tell) -> bool:
    """Write `model/` of the run directory, in one process.

    Raises:
        UserError: a model cannot be read, or they have different tensors, shapes or vocabularies.
    """
    started, ranks = time.monotonic(), Ranks(0, 1, torch.device("cpu"), 0.0)
    a, b, alpha = recipe.merge.a, recipe.merge.b, recipe.merge.alpha
    models, tokenizers = [], []
    for name, path in (("merge.a", a), ("merge.b", b)):
        with checkpoint.no_progress_bars():
            models.append(build_model(Model(path=path), seed=recipe.seed, dtype=torch.float32, field=name))
        tokenizers.append(load_tokenizer(Model(path=path), field=name))
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(f"merge.b = {b!r}: its vocabulary is not that of {a}; their average would say nothing")
    first, second = (dict(model.named_parameters()) for model in models)
    try:
        merged = merge_weights({n: p.detach() for n, p in first.items()}, {n: p.detach() for n, p in second.items()},
                               alpha=alpha)  # fmt: skip
    except ValueError as error:
        raise UserError(f"merge.b = {b!r}: it cannot be averaged with {a}: {error}") from None
    with torch.no_grad():
        for name, weight in merged.items():
            first[name].copy_(weight)
    write_model(directory.model, models[0], tokenizers[0], ranks)
    asked = {"steps": recipe.stage.steps, "epochs": recipe.stage.epochs}
    wall_s = time.monotonic() - started
    summary = {"stage": "merge", "asked": asked, "steps": 0, "a": a, "b": b, "alpha": alpha, "wall_s": wall_s}
    StageJournal(directory, tell).summary(summary | {"model": str(directory.model)})
    return True
