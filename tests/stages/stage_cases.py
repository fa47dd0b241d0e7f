"""Recipes, data and reference models the tests of the stages share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from async_rl.stages import recipe as recipes
from async_rl.stages.config import StageRecipe
from async_rl.stages.directory import StageDirectory, Tell, nothing
from async_rl.stages.runner import StageRun

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "stages"
TINY = {"characters": "0123456789=", "hidden_size": 32, "heads": 4, "kv_heads": 2, "max_length": 16}


def make_data(directory: Path) -> Path:
    """The files that recipes/stages/make_data.py writes."""
    sys.path.insert(0, str(RECIPES))
    try:
        import make_data as script
    finally:
        sys.path.pop(0)
    script.main(directory)
    return directory


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(kind: str, train: Path, **sections: Any) -> StageRecipe:
    """A tiny model, clipping off; `stage` merges into what is needed."""
    table: dict[str, Any] = {
        "model": {"tiny": TINY},
        "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.0},
        **sections,
        "stage": {"kind": kind, "train": str(train), "steps": 4, "batch_rows": 8, **sections.get("stage", {})},
    }
    return recipes.from_table(table)


opened: list[StageRun] = []
"""By `stage_of`; closed after each test."""


def stage_of(recipe: StageRecipe, path: Path, ranks: Any, tell: Tell = nothing, **options: Any) -> StageRun:
    directory = StageDirectory(path)
    directory.create(recipe)
    opened.append(StageRun(recipe, directory, ranks, tell, **options))
    return opened[-1]


def with_steps(recipe: StageRecipe, steps: int) -> StageRecipe:
    return msgspec.structs.replace(recipe, stage=msgspec.structs.replace(recipe.stage, steps=steps))


def weights(stage: StageRun) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in stage.trainer.model.named_parameters()}


def gradients(stage: StageRun) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in stage.trainer.model.named_parameters() if p.grad is not None}


def padded_logprobs(model: LlamaForCausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[S, L - 1] log-probs of every token but the first, by transformers' own forward pass on a padded rectangle."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
