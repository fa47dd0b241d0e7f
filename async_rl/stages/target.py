"""What is evaluated: the weights of a run or of a model directory, and the recipe that names the environment.

choose(Path("runs/sort"))                                         # the newest checkpoint of a run
choose(Path("runs/sort"), checkpoint_name="v00000100")
choose(Path("models/qwen3"), recipe=Path("recipes/math.toml"))    # any model under any recipe
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from async_rl import config, recipes, tables
from async_rl.errors import UserError
from async_rl.learner import checkpoint
from async_rl.models.loading import load_config
from async_rl.models.precision import settle
from async_rl.telemetry.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class Target:
    """Which weights, and the recipe they are evaluated under."""

    name: str
    run: config.Run
    """Its model is the directory of the weights."""
    version: int | None
    """None: the weights are not of a run."""


def choose(
    path: Path, *, recipe: Path | None = None, checkpoint_name: str | None = None, overrides: Sequence[str] = ()
) -> Target:
    """A run directory (its recipe, its newest checkpoint unless one is named), or a model directory and a recipe.

    Raises:
        UserError: `path` is neither, there is no such checkpoint, or no recipe says what the environment is.
    """
    for override in overrides:
        if override.strip().startswith("model."):
            raise UserError(f"--set {override!r}: the weights and their config come from {path}; leave it out")
    table = _config_of(path)
    if "environment" in table:  # a recipe; the config.json of a model has none
        weights = _checkpoint(RunDirectory(path), checkpoint_name)
        version = int(weights.name.removeprefix("v"))
        name = f"{path}, version {version}"
    else:
        if checkpoint_name is not None:
            raise UserError(f"--checkpoint {checkpoint_name}: {path} is a model directory; leave it out")
        if recipe is None:
            hint = ", or give the run directory and --checkpoint" if path.parent.name == "checkpoints" else ""
            raise UserError(
                f"{path} is a model directory: write --recipe RECIPE, which names the environment and its options{hint}"
            )
        weights, version, name = path, None, str(path)
    folder = Path()
    if recipe is not None:
        table, folder = _read_toml(recipe), recipe.parent
    run = settle(_with_weights(table, weights, overrides, folder))
    load_config(run.model)
    return Target(name, run, version)


def _config_of(path: Path) -> dict[str, Any]:
    """config.json of a run directory or of a model directory."""
    instead = "write a run directory, or a model directory and --recipe"
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory; {instead}")
    try:
        table = json.loads((path / "config.json").read_text())
    except OSError as error:
        raise UserError(f"{path}: config.json: {error.strerror}; {instead}") from None
    except ValueError as error:
        raise UserError(f"{path}: config.json is damaged: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: config.json holds no table; {instead}")
    return cast(dict[str, Any], table)


def _read_toml(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text())
    except OSError as error:
        raise UserError(f"recipe {recipe}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {recipe} is not TOML: {error}") from None


def _with_weights(table: dict[str, Any], weights: Path, overrides: Sequence[str], folder: Path) -> config.Run:
    """The recipe with these weights as its model: the model it names need not be on this machine."""
    table["model"] = {}
    recipes.resolve_paths(table, folder)
    for override in overrides:
        tables.apply_override(table, override)
    recipes.resolve_paths(table, Path())
    table["model"] = {"path": str(weights.absolute())}
    return recipes.from_table(table)


def _checkpoint(directory: RunDirectory, name: str | None) -> Path:
    newest = checkpoint.latest(directory.checkpoints)
    if newest is None:
        raise UserError(
            f"{directory.path}: there is no checkpoint yet; wait for one, or stop the run, which writes one"
        )
    if name is None:
        return newest[0]
    known = sorted(path.name for path in directory.checkpoints.iterdir() if checkpoint.NAME.fullmatch(path.name))
    if name not in known:
        raise UserError(f"--checkpoint {name}: {directory.path} has {', '.join(known)}")
    return directory.checkpoints / name
