"""Merging two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from async_rl.config import Model, TinyModel
from async_rl.errors import UserError
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.stages import merge
from async_rl.stages import recipe as recipes
from async_rl.stages.directory import StageDirectory, nothing


def saved(path: Path, seed: int, **sizes: Any) -> Path:
    model = Model(tiny=TinyModel(**{"characters": "0123456789=", "hidden_size": 32, "layers": 1} | sizes))
    build_model(model, seed=seed).save_pretrained(path)
    load_tokenizer(model).save_pretrained(path)
    return path


def merged(tmp_path: Path, a: Path, b: Path, alpha: float) -> Path:
    table = {"stage": {"kind": "merge"}, "merge": {"a": str(a), "b": str(b), "alpha": alpha}}
    directory = StageDirectory(tmp_path / f"run-{b.name}-{alpha}")
    recipe = recipes.from_table(table)
    directory.create(recipe)
    assert merge.run(recipe, directory, nothing) and directory.is_complete(recipe)
    return directory.model


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_weights_are_averaged(tmp_path: Path, alpha: float) -> None:
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)
    found = build_model(Model(path=str(merged(tmp_path, a, b, alpha))), seed=0).state_dict()
    ours, theirs = (build_model(Model(path=str(path)), seed=0).state_dict() for path in (a, b))
    for name, weight in found.items():
        torch.testing.assert_close(weight, alpha * ours[name] + (1 - alpha) * theirs[name], msg=name)
    assert load_tokenizer(Model(path=str(tmp_path / f"run-b-{alpha}" / "model"))).get_vocab()
    assert json.loads((tmp_path / f"run-b-{alpha}" / "summary.json").read_text())["alpha"] == alpha


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", 1)
    with pytest.raises(UserError, match=r"merge.b = .*: it cannot be averaged with .*: models have different tensors"):
        merged(tmp_path, a, saved(tmp_path / "deep", 1, layers=2), 0.5)
    with pytest.raises(UserError, match=r"merge.b = .*shapes \(14, 32\) and \(14, 64\) differ"):
        merged(tmp_path, a, saved(tmp_path / "wide", 1, hidden_size=64), 0.5)
    with pytest.raises(UserError, match=r"merge.b = .*: its vocabulary is not that of"):
        merged(tmp_path, a, saved(tmp_path / "other", 1, characters="abcdefghij="), 0.5)
    with pytest.raises(UserError, match=r"merge.b = 'nowhere': there is no such directory"):
        merged(tmp_path, a, Path("nowhere"), 0.5)
    with pytest.raises(UserError, match=r"merge = 'one model': write the directories a and b"):
        recipes.from_table({"stage": {"kind": "merge"}, "merge": {"a": str(a)}})
