"""Reading the recipe of a stage.

recipe = load(Path("recipes/stages/sort_sft.toml"), "sft", ["stage.steps=20"])
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from async_rl import recipes, tables
from async_rl.errors import UserError
from async_rl.stages.config import KINDS, Kind, StageRecipe
from async_rl.stages.recipe_checks import check

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
    check(recipe)
    return recipe


def _resolve(table: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe absolute."""
    for section, key in PATHS:
        inner = table.get(section)
        path = typing.cast(dict[str, Any], inner).get(key) if isinstance(inner, dict) else None
        if isinstance(path, str) and path:
            typing.cast(dict[str, Any], inner)[key] = str((folder / path).resolve())
