"""Reading a recipe.

    run = load(Path("recipes/sort.toml"), ["steps=20", "optimizer.learning_rate=1e-4"])

Every error is a UserError that names the field, the value and what to write instead.
"""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any

from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.recipe_checks import check
from async_rl.tables import apply_override, convert

MODEL_SECTIONS = ("model", "reference", "critic", "reward_model")
"""Those whose `path` is a model directory."""
DATA_OPTIONS = ("data", "heldout_data")
"""Options of an environment that name files."""


def load(recipe: Path, overrides: typing.Sequence[str] = ()) -> Run:
    """Read a recipe, apply `section.key=value` overrides, check every field.

    Raises:
        UserError: naming the field, the value and what to write instead.
    """
    run = from_table(read_table(recipe, overrides))
    for section in MODEL_SECTIONS:
        check_model_directory(section, getattr(run, section).path)
    return run


def check_model_directory(section: str, path: str) -> None:
    """Who only looks at a run needs no model. Raises UserError."""
    if path and not Path(path).is_dir():
        raise UserError(f"{section}.path = {path!r}: write the path of a model directory")


def read_table(
    recipe: Path,
    overrides: typing.Sequence[str],
    resolve: typing.Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """The tables of a recipe with overrides applied and paths made absolute (`resolve`, by default `resolve_paths`).

    Raises:
        UserError: no such file, no TOML, or an override that is none.
    """
    resolve = resolve or resolve_paths
    try:
        table = tomllib.loads(recipe.read_text())
    except OSError as error:
        raise UserError(f"recipe {recipe}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {recipe} is not TOML: {error}") from None
    resolve(table, recipe.parent)
    for override in overrides:
        apply_override(table, override)
    resolve(table, Path())
    return table


def resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe absolute: it means the same files wherever it is used from."""
    paths = [(section, "path") for section in MODEL_SECTIONS]
    for *sections, key in (*paths, ("environment", "module"), ("generator", "sglang", "python"), ("rewards", "python")):
        inner: Any = table
        for section in sections:
            inner = typing.cast(dict[str, Any], inner).get(section) if isinstance(inner, dict) else None
        path = typing.cast(dict[str, Any], inner).get(key) if isinstance(inner, dict) else None
        if isinstance(path, str) and path and (key != "module" or path.endswith(".py")):
            found = folder / path  # not resolved where it is a program: a virtual environment's Python is a link
            typing.cast(dict[str, Any], inner)[key] = str(found.absolute() if key == "python" else found.resolve())
    _resolve_data(table, folder)


def _resolve_data(table: dict[str, Any], folder: Path) -> None:
    """Files that an environment's options name, if they are there: what else an option says is its own."""
    section: Any = table.get("environment")
    options = typing.cast(dict[str, Any], section).get("options") if isinstance(section, dict) else None
    for key in DATA_OPTIONS:
        path = typing.cast(dict[str, Any], options).get(key) if isinstance(options, dict) else None
        if isinstance(path, str) and path and (folder / path).is_file():
            typing.cast(dict[str, Any], options)[key] = str((folder / path).resolve())


def from_table(table: dict[str, Any]) -> Run:
    """A checked recipe from plain tables. Raises UserError as `load` does."""
    run = convert(table, Run)
    check(run)
    return run
