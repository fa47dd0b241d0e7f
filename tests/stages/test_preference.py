"""Preference training: the formulae on a padded reference, the reference model, learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_cases import RECIPES, gradients, padded_logprobs, recipe_of, stage_of, weights, write
from torch import Tensor

from async_rl.config import Model, TinyModel
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Abandoned
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.models.text import encode
from async_rl.stages import kinds
from async_rl.stages import recipe as recipes
from async_rl.stages.preference import PreferenceTrainer

TINY = recipe_of("sft", Path("x")).model
LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo"},
    {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    {"loss": "dpo_norm"},
    {"loss": "simpo", "gamma": 0.7},
    {"loss": "ipo"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Answers of unequal length."""
    rng = np.random.default_rng(2)

    def digits(low: int, high: int) -> str:
        return "".join(map(str, rng.integers(0, 10, rng.integers(low, high))))

    rows = [{"prompt": digits(1, 4) + "=", "chosen": digits(1, 7), "rejected": digits(2, 7) + "0"} for _ in range(12)]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model, as the reference."""
    build_model(TINY, seed=5).save_pretrained(tmp_path / "other")
    load_tokenizer(TINY).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def sums(model: Any, file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """[12, 2] log-probs summed over chosen and rejected answers, in fp64, and their lengths; [12, 2]"""
    tokenizer = load_tokenizer(TINY)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found, lengths = [], []
    for row in rows:
        prompt = [1, *encode(tokenizer, row["prompt"])]
        answers = [[*encode(tokenizer, row[name]), 2] for name in ("chosen", "rejected")]
        logp = padded_logprobs(model, [prompt + answer for answer in answers]).double()
        found.append(torch.stack([logp[i, len(prompt) - 1 :][: len(a)].sum() for i, a in enumerate(answers)]))
        lengths.append([len(answer) for answer in answers])
    return torch.stack(found), torch.tensor(lengths), torch.tensor(0)


def expected(loss: str, policy: Tensor, reference: Tensor, lengths: Tensor, **options: float) -> Tensor:
    """[12] written out once more, from the papers."""
    beta = options.get("beta", {"dpo": 0.1, "dpo_norm": 5.0, "simpo": 2.0, "ipo": 0.1}[loss])
    smoothing = options.get("label_smoothing", 0.0)
    score = {
        "dpo": policy - reference,
        "dpo_norm": (policy - reference) / lengths,
        "simpo": policy / lengths,
        "ipo": policy - reference,
    }[loss]
    h = score[:, 0] - score[:, 1]
    if loss == "ipo":
        return (h - 0.5 / beta) ** 2
    z = beta * h - (options["gamma"] if loss == "simpo" else 0.0)
    return (1 - smoothing) * torch.log1p(torch.exp(-z)) + smoothing * torch.log1p(torch.exp(z))


@pytest.mark.parametrize("options", LOSSES, ids=lambda one: "-".join(map(str, one.values())))
def test_loss_and_gradient(ranks: Ranks, tmp_path: Path, pairs: Path, other: Path, options: dict[str, Any]) -> None:
    """Packed with shared prompts and split, against transformers' padded forward pass and the formula written out."""
    section = options | ({} if options["loss"] == "simpo" else {"reference_path": str(other)})
    recipe = recipe_of("preference", pairs, preference=section, stage={"batch_rows": 12},
                       learner={"microbatch_tokens": 60})  # fmt: skip
    stage = stage_of(recipe, tmp_path / "run", ranks)
    stage.train(stage.data.train)
    model = build_model(TINY, seed=recipe.seed)
    policy, lengths, _ = sums(model, pairs)
    with torch.no_grad():
        reference = sums(build_model(Model(path=str(other)), seed=0), pairs)[0]
    loss = expected(policy=policy, reference=reference, lengths=lengths, **options).mean()
    loss.backward()
    assert stage.journal.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    found = gradients(stage)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    beta = stage.trainer._beta  # pyright: ignore
    score = policy.detach() - (0 if options["loss"] == "simpo" else reference)
    score = score / lengths if options["loss"] in ("simpo", "dpo_norm") else score
    row = stage.journal.rows[0]
    assert row["reward_chosen"] == pytest.approx((beta * score[:, 0]).mean().item(), rel=1e-5, abs=1e-6)
    assert row["reward_accuracy"] == pytest.approx((score[:, 0] > score[:, 1]).double().mean().item())


def test_at_the_reference_the_loss_is_ln_2_and_no_pair_is_right(ranks: Ranks, tmp_path: Path, pairs: Path) -> None:
    stage = stage_of(recipe_of("preference", pairs), tmp_path / "run", ranks)
    stage.train(stage.data.train)
    row = stage.journal.rows[0]
    assert row["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert row["reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were built, by where they came from."""
    seen: list[str] = []
    build = kinds.build_model

    def watched(source: Model, **options: Any) -> Any:
        seen.append(source.path or "tiny")
        return build(source, **options)

    monkeypatch.setattr(kinds, "build_model", watched)
    return seen


def test_simpo_loads_no_reference(ranks: Ranks, tmp_path: Path, pairs: Path, built: list[str]) -> None:
    stage = stage_of(recipe_of("preference", pairs, preference={"loss": "simpo"}), tmp_path / "run", ranks)
    assert stage.to_the_end() and built == ["tiny"]
    assert isinstance(stage.trainer, PreferenceTrainer) and stage.trainer._reference is None
    assert not (tmp_path / "run" / kinds.REFERENCE_FILE).exists()


def test_a_cached_reference_is_computed_once_and_says_the_same(
    ranks: Ranks, tmp_path: Path, pairs: Path, other: Path, built: list[str]
) -> None:
    stages = {}
    for how in ("cached", "per_step"):
        section = {"reference": how, "reference_path": str(other)}
        recipe = recipe_of("preference", pairs, preference=section, stage={"steps": 3, "heldout_rows": 4})
        stages[how] = stage_of(recipe, tmp_path / how, ranks)
        assert stages[how].to_the_end()
    for one, two in zip(stages["cached"].journal.rows, stages["per_step"].journal.rows, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for name, weight in weights(stages["cached"]).items():
        torch.testing.assert_close(weights(stages["per_step"])[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    built.clear()
    section = {"reference": "cached", "reference_path": str(other)}
    recipe = recipe_of("preference", pairs, preference=section, stage={"steps": 4, "heldout_rows": 4})
    assert stage_of(recipe, tmp_path / "cached", ranks).to_the_end()
    assert [Path(path).name for path in built] == ["v00000003"], "a stage that continues needs no reference"


def test_stopped_and_continued_is_as_never_stopped(ranks: Ranks, tmp_path: Path, pairs: Path) -> None:
    recipe = recipe_of("preference", pairs, stage={"steps": 5, "batch_rows": 4})
    straight = stage_of(recipe, tmp_path / "straight", ranks)
    assert straight.to_the_end()
    with pytest.raises(Abandoned):
        stage_of(recipe, tmp_path / "stopped", ranks, asked_to_stop=lambda: True)
    calls = iter(range(100))
    stopped = stage_of(recipe, tmp_path / "stopped", ranks, asked_to_stop=lambda: next(calls) == 4)
    assert not stopped.to_the_end() and stopped.step == 3
    continued = stage_of(recipe, tmp_path / "stopped", ranks)
    assert continued.to_the_end()
    for name, weight in weights(straight).items():
        assert torch.equal(weights(continued)[name], weight), name


def test_a_reference_of_another_vocabulary_is_refused(ranks: Ranks, tmp_path: Path, pairs: Path) -> None:
    tiny = Model(tiny=TinyModel(characters="01"))
    build_model(tiny, seed=1).save_pretrained(tmp_path / "small")
    load_tokenizer(tiny).save_pretrained(tmp_path / "small")
    recipe = recipe_of("preference", pairs, preference={"reference_path": str(tmp_path / "small")})
    with pytest.raises(UserError, match=r"preference\.reference_path = .*: its tokenizer has another vocabulary"):
        stage_of(recipe, tmp_path / "run", ranks)


def test_dpo_learns_the_order_of_pairs_it_never_saw(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    """The recipe, shorter: real training."""
    sets = [f"stage.train={data}/sort_pairs.jsonl", f"stage.heldout={data}/sort_pairs_heldout.jsonl"]
    recipe = recipes.load(RECIPES / "sort_preference.toml", "preference", [*sets, "stage.epochs=11"])
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    first, last = stage.journal.evaluations[0], stage.journal.evaluations[-1]
    assert first["reward_accuracy"] < 0.6 and last["reward_accuracy"] >= 0.95, last
    assert last["reward_margin"] > 0.5


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"gamma": 1.0}, r"preference.gamma = 1.0: only simpo use"),
        ({"loss": "ipo", "label_smoothing": 0.1}, r"preference.label_smoothing = 0.1: only dpo, dpo_norm, simpo use"),
        ({"loss": "simpo", "reference_path": "x"}, r"preference.reference_path = 'x': only dpo, dpo_norm, ipo use"),
        ({"beta": 0.0}, r"preference.beta = 0.0: write a number above 0"),
        ({"label_smoothing": 0.5}, r"preference.label_smoothing = 0.5: write a share from 0 to below 0.5"),
    ],
)
def test_wrong_recipes(section: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of("preference", Path("x"), preference=section)
