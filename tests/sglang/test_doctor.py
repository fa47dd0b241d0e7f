"""`async-rl doctor --attached` on a real server that runs already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from async_rl import recipes
from async_rl.config import TinyModel
from async_rl.doctor.examine import examine
from async_rl.models.tiny import tiny_tokenizer

from .conftest import ROOT, Server

SORT = ROOT / "recipes" / "sort.toml"


@pytest.mark.timeout(200)
def test_attached_servers_are_compared(server: Server, model_directory: Path, tmp_path: Path) -> None:
    """They sample with the recipe's weights for it, and agree with the learner."""
    shutil.copytree(model_directory, tmp_path / "model")
    tiny_tokenizer(TinyModel(characters="0123456789=")).save_pretrained(tmp_path / "model")
    head, _, tail = SORT.read_text().partition("[model.tiny]")
    recipe = tmp_path / "sort.toml"
    recipe.write_text(head + '[model]\npath = "model"\n\n[environment]' + tail.partition("[environment]")[2])
    sets = ["generator.engine=sglang", f"generator.sglang.attach=['{server.url}/']", "generator.max_length=0"]
    found = {check.name: check for check in examine(recipes.load(recipe, sets), tmp_path / "runs", attached=True)}
    numerics = found["numerics"]
    assert numerics.status == "ok" and numerics.data["observations"]["gap"]["max"] < 1e-4, numerics
    assert server.run(lambda client: client.weight_version()) not in ("none", "default"), "it keeps them"
