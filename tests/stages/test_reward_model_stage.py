"""Reward models: losses against transformers' classifier, the bias, what RL is given, learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cases import RECIPES, gradients, recipe_of, stage_of, write
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForSequenceClassification

from async_rl.config import Environment, Run
from async_rl.config import RewardModel as RewardModelSection
from async_rl.learner.distributed import Ranks
from async_rl.learner.reward_model import RewardModel
from async_rl.learner.scalar import PackedScalar
from async_rl.models.loading import load_tokenizer
from async_rl.models.text import encode
from async_rl.stages import recipe as recipes

ROWS: list[dict[str, Any]] = [
    {"prompt": "12=", "chosen": "12", "rejected": "9"},
    {"prompt": "31=", "chosen": "13", "rejected": "3111", "margin": 2.0},
    {"prompt": "5=", "responses": ["7", "5", "66", "511"], "ranking": [1, 3, 0, 2]},
    {"prompt": "402=", "responses": ["4", "024"], "ranking": [1, 0]},
]


def padded_scores(model: Any, prompt: str, answers: list[str], tokenizer: Any) -> Tensor:
    """[K] by transformers' own classifier, one by one: without padding there is no question which token is last."""
    rows = [torch.tensor([[1, *encode(tokenizer, prompt), *encode(tokenizer, answer), 2]]) for answer in answers]
    return torch.cat([model(input_ids=row).logits[:, 0] for row in rows])


def best_first(row: dict[str, Any]) -> list[str]:
    if "chosen" in row:
        return [row["chosen"], row["rejected"]]
    return [row["responses"][number] for number in row["ranking"]]


@pytest.mark.parametrize("cap", [30, 4096])
def test_loss_and_gradient(ranks: Ranks, tmp_path: Path, cap: int) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    recipe = recipe_of("reward-model", file, stage={"batch_rows": 4}, learner={"microbatch_tokens": cap})
    start = PackedScalar.load(recipe.model, seed=recipe.seed)
    start.save(tmp_path / "start", load_tokenizer(recipe.model))
    stage = stage_of(recipe, tmp_path / "run", ranks)
    stage.train(stage.data.train)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")
    tokenizer = load_tokenizer(recipe.model)
    losses, right = [], []
    for row in ROWS:
        score = padded_scores(model, row["prompt"], best_first(row), tokenizer)
        pairs = [(a, b) for a in range(len(score)) for b in range(a + 1, len(score))]
        losses.append(torch.stack([softplus(score[b] - score[a] + row.get("margin", 0.0)) for a, b in pairs]).mean())
        right.append(sum(float(score[a] > score[b]) for a, b in pairs) / len(pairs))
    loss = torch.stack(losses).mean()
    loss.backward()
    row = stage.journal.rows[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["accuracy"] == pytest.approx(sum(right) / 4)
    found = gradients(stage)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("references", [False, True])
def test_reference_answers_score_nothing_on_average(ranks: Ranks, tmp_path: Path, references: bool) -> None:
    """The bias is stored, is read again when the stage continues from there, and is what RL subtracts."""
    file, sections = write(tmp_path / "rows.jsonl", ROWS), {}
    answers = [(row["prompt"], best_first(row)[0]) for row in ROWS]
    if references:
        answers = [("7=", "7"), ("80=", "08"), ("1=", "1111")]
        rows = [{"prompt": prompt, "response": response} for prompt, response in answers]
        sections = {"reward_model": {"references": str(write(tmp_path / "references.jsonl", rows))}}
    stage = stage_of(recipe_of("reward-model", file, **sections), tmp_path / "run", ranks)
    assert stage.to_the_end()
    directory = tmp_path / "run" / "model"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(directory),
        load_tokenizer(stage._recipe.model),
    )
    scores = torch.cat([padded_scores(model, prompt, [answer], tokenizer) for prompt, answer in answers])
    assert model.config.num_labels == 1 and model.config.reward_bias == pytest.approx(scores.mean().item(), abs=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bias"] == model.config.reward_bias and summary["references"] == len(answers)
    run = Run(steps=1, model=stage._recipe.model, environment=Environment(name="sorting"),
              reward_model=RewardModelSection(path=str(directory)))  # fmt: skip
    assert RewardModel(run, ranks, tokenizer).module.bias == model.config.reward_bias
    again = stage_of(recipe_of("reward-model", file, model={"path": str(directory)}), tmp_path / "again", ranks)
    assert torch.equal(again.trainer.model.score.weight, model.score.weight)  # pyright: ignore


def test_it_learns_which_answers_are_better(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    """The recipe, shorter: real training, prompts never seen."""
    sets = [f"stage.train={data}/sort_rankings.jsonl", f"stage.heldout={data}/sort_rankings_heldout.jsonl"]
    recipe = recipes.load(RECIPES / "sort_reward_model.toml", "reward-model", [*sets, "stage.epochs=3.5"])
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    first, last = stage.journal.evaluations[0], stage.journal.evaluations[-1]
    assert first["accuracy"] < 0.7 and last["accuracy"] > 0.9 and last["margin"] > 1, last
