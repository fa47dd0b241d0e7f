"""`learner.sharding = "full"` in every kind of stage: two ranks that share the weights do what one rank does alone.

A micro-batch holds two rows or three, so that a rank makes several, and one without rows where the numbers are odd; the
one held-out row, and the last step's one, leave a rank without any. In the end one rank goes on from the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stage_cases import recipe_of, weights, write

from async_rl.config import Model, TinyModel
from async_rl.learner.distributed import Ranks
from async_rl.learner.sharding import local
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.stages.config import StageRecipe
from async_rl.stages.directory import StageDirectory
from async_rl.stages.runner import StageRun
from tests.many_ranks import in_ranks

DISTILL = {"max_new_tokens": 5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "dpo": ("preference", {"preference": {"loss": "dpo", "reference": "cached"}}),
    "dpo, reference per step": ("preference", {"preference": {"loss": "dpo", "reference": "per_step"}}),
    "reward model": ("reward-model", {}),
    "distill on data": ("distill", {"distill": {"responses": "data"}}),
    "distill on policy": (
        "distill", {"distill": {**DISTILL, "responses": "student", "direction": "forward"}, "generator": {"slots": 8}},
    ),
    "distill what the teacher says": (
        "distill",
        {"distill": {**DISTILL, "responses": "teacher", "loss": "cross_entropy"}, "generator": {"slots": 8}},
    ),
}  # fmt: skip


def rows_of(kind: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)

    def digits(low: int, high: int) -> str:
        return "".join(map(str, rng.integers(0, 10, rng.integers(low, high))))

    said = {
        "sft": lambda: {"response": digits(1, 7)},
        "distill": lambda: {"response": digits(1, 7)},
        "preference": lambda: {"chosen": digits(1, 7), "rejected": digits(2, 7)},
        "reward-model": lambda: {"responses": [digits(1, 7) for _ in range(3)], "ranking": [2, 0, 1]},
    }[kind]
    return [{"prompt": digits(1, 4) + "=", **said()} for _ in range(16)]


def recipe_for(name: str, folder: Path, sharding: str) -> StageRecipe:
    """Three steps: of seven rows, of seven, of one."""
    kind, sections = KINDS[name]
    if kind == "distill":
        teacher = Model(tiny=TinyModel(characters="0123456789=", hidden_size=48, max_length=16))
        build_model(teacher, seed=5).save_pretrained(folder / "teacher")
        load_tokenizer(teacher).save_pretrained(folder / "teacher")
        sections = sections | {"distill": {**sections["distill"], "teacher": str(folder / "teacher")}}
    stage = {"steps": 0, "epochs": 1, "batch_rows": 7, "heldout_rows": 1, "evaluate_every": 2}
    learner = {"sharding": sharding, "microbatch_tokens": 60, "activation_checkpointing": sharding == "full"}
    return recipe_of(kind, write(folder / "rows.jsonl", rows_of(kind)), stage=stage, learner=learner,
                     checkpoint={"every_steps": 2}, **sections)  # fmt: skip


def trained(recipe: StageRecipe, path: Path, ranks: Ranks) -> tuple[list[Any], list[Any], int]:
    """What was written down at steps and at evaluations, and how many rows of a matrix this rank holds."""
    directory = StageDirectory(path)
    if ranks.rank == 0:
        directory.create(recipe)
    stage = StageRun(recipe, directory, ranks)
    try:
        assert stage.to_the_end()
        held = len(local(weights(stage)["model.layers.0.mlp.up_proj.weight"]))
        return stage.journal.rows, stage.journal.evaluations, held
    finally:
        stage.close()


def all_of(rank: int, recipes: dict[str, StageRecipe], folder: str) -> dict[str, Any]:
    ranks = Ranks.start(torch.device("cpu"))
    try:
        return {name: trained(recipe, Path(folder) / name / "two", ranks) for name, recipe in recipes.items()}
    finally:
        ranks.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in KINDS:
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    """All kinds in one pair of processes."""
    recipes = {name: recipe_for(name, folder / name, "full") for name in KINDS}
    first, second = in_ranks(2, all_of, recipes, str(folder))
    for name in KINDS:
        assert first[name][2] + second[name][2] == 256 and second[name][2] == 128, "the ranks share the weights"
    return first


def longer(recipe: StageRecipe) -> StageRecipe:
    return msgspec.structs.replace(recipe, stage=msgspec.structs.replace(recipe.stage, epochs=2.0))


@pytest.mark.processes
@pytest.mark.parametrize("name", list(KINDS))
def test_two_sharded_ranks_equal_one(name: str, two: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    shared, recipe = (recipe_for(name, folder / name, sharding) for sharding in ("full", "none"))
    one, both = folder / name / "one", folder / name / "two"
    rows, evaluations, held = trained(recipe, one, ranks)
    assert held == 256 and [row["rows"] for row in rows] == [7, 7, 1] and len(evaluations) == 3
    untimed = {"wall_s", "tokens_per_s", "timestamp"}
    for mine, theirs in zip([*rows, *evaluations], [*two[name][0], *two[name][1]], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - untimed:
            assert theirs[key] == pytest.approx(mine[key], rel=2e-4, abs=1e-5), key
    trained(longer(recipe), one, ranks)
    trained(longer(shared), both, ranks)  # one rank goes on, with the optimiser's states of both
    alone, together = (load_file(path / "model" / "model.safetensors") for path in (one, both))
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, atol=1e-4, rtol=1e-3, msg=key)
