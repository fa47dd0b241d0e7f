"""Distillation: from text, from the distributions of a teacher, on the student's own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import RECIPES, gradients, recipe_of, stage_of, weights, write

from async_rl.algorithms.distillation import distill_kl
from async_rl.config import Model, TinyModel
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.models.text import encode
from async_rl.stages import recipe as recipes
from async_rl.stages.config import StageRecipe
from async_rl.stages.runner import StageRun

GENERATOR = {"slots": 32}


@pytest.fixture(scope="module")
def teacher(ranks: Ranks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a hundred prompts by heart."""
    sets = [f"stage.train={data}/sort_100.jsonl", "stage.heldout=", "stage.evaluate_every=0", "stage.steps=60"]
    recipe = recipes.load(RECIPES / "sort_sft.toml", "sft", sets)
    path = tmp_path_factory.mktemp("teacher")
    assert stage_of(recipe, path, ranks).to_the_end()
    return path / "model"


def distill(data: Path, said: Path, stage: dict[str, Any], **section: Any) -> StageRecipe:
    said_by = {"teacher": str(said), **section}
    sampled = said_by.get("responses") != "data"
    tiny = {"characters": "0123456789=", "intermediate_size": 192, "max_length": 16}
    return recipe_of(
        "distill", data / "sort_100.jsonl", stage={"batch_rows": 50, "heldout_rows": 20, **stage},
        model={"tiny": tiny}, optimizer={"learning_rate": 2e-3, "clip_norm": 0.0},
        generator=GENERATOR if sampled else {}, distill=({"max_new_tokens": 5} if sampled else {}) | said_by,
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_kl_of_a_padded_batch(ranks: Ranks, data: Path, teacher: Path, tmp_path: Path, direction: Any) -> None:
    """On text of the data, against transformers' logits and the formula on them."""
    recipe = distill(data, teacher, {"batch_rows": 80, "heldout_rows": 20}, responses="data", direction=direction)
    stage = stage_of(recipe, tmp_path / "run", ranks)
    stage.train(stage.data.train)
    student, tokenizer = build_model(recipe.model, seed=recipe.seed), load_tokenizer(recipe.model)
    other = build_model(Model(path=str(teacher)), seed=0).requires_grad_(False)
    rows = [json.loads(line) for line in (data / "sort_100.jsonl").read_text().splitlines()]
    kept = [rows[number] for number in stage.data.train]
    ids = torch.tensor([[1, *encode(tokenizer, row["prompt"] + row["response"]), 2] for row in kept])
    logits, others = (model(input_ids=ids).logits[:, 5:-1] for model in (student, other))
    loss = distill_kl(logits.flatten(0, 1), others.flatten(0, 1), direction=direction).mean()
    loss.backward()
    assert stage.journal.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stage.journal.rows[0]["kl"] == pytest.approx(loss.item(), rel=1e-5)
    found = gradients(stage)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def kl_of(stage: StageRun) -> tuple[float, float]:
    return stage.journal.evaluations[0]["kl"], stage.journal.evaluations[-1]["kl"]


def test_on_policy_the_student_comes_close_to_the_teacher(
    ranks: Ranks, data: Path, teacher: Path, tmp_path: Path
) -> None:
    """Reverse KL on what the student samples itself: real training, measured on prompts it was not trained on."""
    stage = stage_of(distill(data, teacher, {"steps": 60}), tmp_path / "run", ranks)
    assert stage.to_the_end()
    before, after = kl_of(stage)
    assert after < before / 4, (before, after)
    assert all(0 < row["response_tokens"] <= 5 for row in stage.journal.rows)


def test_the_samples_of_a_step_are_those_of_its_number(ranks: Ranks, data: Path, teacher: Path, tmp_path: Path) -> None:
    """Stopped and continued it is as never stopped, bit for bit, though every step samples."""
    recipe = distill(data, teacher, {"steps": 4, "heldout_rows": 0})
    straight = stage_of(recipe, tmp_path / "straight", ranks)
    assert straight.to_the_end()
    calls = iter(range(100))
    stopped = stage_of(recipe, tmp_path / "stopped", ranks, asked_to_stop=lambda: next(calls) == 2)
    assert not stopped.to_the_end() and stopped.step == 2
    continued = stage_of(recipe, tmp_path / "stopped", ranks)
    assert continued.to_the_end()
    for name, weight in weights(straight).items():
        assert torch.equal(weights(continued)[name], weight), name


def test_cross_entropy_on_what_the_teacher_says(ranks: Ranks, data: Path, teacher: Path, tmp_path: Path) -> None:
    """Sampled from it: the student then says on its prompts what the teacher says."""
    recipe = distill(data, teacher, {"steps": 80}, responses="teacher", loss="cross_entropy", temperature=0.5)
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    assert stage.journal.rows[0]["loss"] > 2 and stage.journal.rows[-1]["loss"] < 0.6, stage.journal.rows[-1]
    text = distill(data, teacher, {"steps": 2}, responses="data", loss="cross_entropy", teacher="")
    assert stage_of(text, tmp_path / "text", ranks).to_the_end(), "text of the data needs no teacher"


def test_wrong_recipes(ranks: Ranks, data: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.teacher = '': write the directory of the teacher"):
        distill(data, teacher, {}, teacher="")
    with pytest.raises(UserError, match=r"distill.loss = 'cross_entropy': cross-entropy on the student's own samples"):
        distill(data, teacher, {}, loss="cross_entropy")
    with pytest.raises(UserError, match=r"distill.max_new_tokens = 16: no token is left for the prompt"):
        stage_of(distill(data, teacher, {}, max_new_tokens=16), tmp_path / "long", ranks)
    other = Model(tiny=TinyModel(characters="01"))
    build_model(other, seed=1).save_pretrained(tmp_path / "other")
    load_tokenizer(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"distill.teacher = .*: its tokenizer has another vocabulary"):
        stage_of(distill(data, tmp_path / "other", {}), tmp_path / "run", ranks)
    missing = write(tmp_path / "rows.jsonl", [{"prompt": "1="}])
    with pytest.raises(UserError, match=r"line 1: response is missing"):
        recipe = distill(data, teacher, {"train": str(missing)}, responses="data")
        stage_of(recipe, tmp_path / "rows", ranks)
