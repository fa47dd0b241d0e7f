"""SFT: the numbers of a plain implementation, whatever the packing; learning; stopping and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from stage_cases import RECIPES, gradients, padded_logprobs, recipe_of, stage_of, weights, with_steps, write
from transformers import AutoModelForCausalLM

from async_rl.config import Learner, Model
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.models.text import encode
from async_rl.stages import recipe as recipes
from async_rl.stages.directory import StageDirectory
from async_rl.stages.runner import StageRun, run
from tests.many_ranks import in_ranks


def ragged(path: Path, rows: int = 16) -> Path:
    """Responses of 1 to 8 digits."""
    rng = np.random.default_rng(1)

    def digits(low: int, high: int) -> str:
        return "".join(map(str, rng.integers(0, 10, rng.integers(low, high))))

    return write(path, [{"prompt": digits(1, 5) + "=", "response": digits(1, 8)} for _ in range(rows)])


def test_the_loss_and_gradient_of_a_padded_batch(ranks: Ranks, tmp_path: Path) -> None:
    """Against transformers' own forward pass on a padded rectangle."""
    file = ragged(tmp_path / "rows.jsonl")
    recipe = recipe_of("sft", file, stage={"batch_rows": 16})
    stage = stage_of(recipe, tmp_path / "run", ranks)
    stage.train(stage.data.train)
    model, tokenizer = build_model(recipe.model, seed=recipe.seed), load_tokenizer(recipe.model)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = [[1, *encode(tokenizer, row["prompt"])] for row in rows]
    responses = [[*encode(tokenizer, row["response"]), 2] for row in rows]
    logp = padded_logprobs(model, [a + b for a, b in zip(prompts, responses, strict=True)])
    trained = [
        logp[i, len(a) - 1 : len(a) + len(b) - 1] for i, (a, b) in enumerate(zip(prompts, responses, strict=True))
    ]
    loss = -torch.cat(trained).mean()
    loss.backward()
    assert stage.journal.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    found = gradients(stage)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("cap", [16, 40, 4096])
def test_any_split_into_micro_batches(ranks: Ranks, tmp_path: Path, cap: int) -> None:
    recipe = recipe_of("sft", ragged(tmp_path / "rows.jsonl"))
    whole = stage_of(recipe, tmp_path / "whole", ranks)
    whole.train(whole.data.train)
    other = msgspec.structs.replace(recipe, learner=Learner(microbatch_tokens=cap))
    split = stage_of(other, tmp_path / "split", ranks)
    split.train(split.data.train)
    assert split.journal.rows[0]["loss"] == pytest.approx(whole.journal.rows[0]["loss"], rel=1e-6)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_stopped_and_continued_is_as_never_stopped(ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit: weights, metrics, evaluations."""
    file = ragged(tmp_path / "rows.jsonl")
    recipe = recipe_of("sft", file, stage={"steps": 7, "batch_rows": 3, "heldout_rows": 4, "evaluate_every": 2})
    straight = stage_of(recipe, tmp_path / "straight", ranks)
    assert straight.to_the_end()
    calls = 0

    def stop_in_step_four() -> bool:
        """Asked once a micro-batch: one for each of the evaluations at 0 and 2, one a step."""
        nonlocal calls
        calls += 1
        return calls == 6

    assert not stage_of(recipe, tmp_path / "stopped", ranks, asked_to_stop=stop_in_step_four).to_the_end()
    assert not (tmp_path / "stopped" / "summary.json").exists()
    continued = stage_of(recipe, tmp_path / "stopped", ranks)
    assert continued.step == 3
    assert continued.to_the_end()
    for name, weight in weights(straight).items():
        assert torch.equal(weights(continued)[name], weight), name
    volatile = {"timestamp", "wall_s", "tokens_per_s"}
    for one, other in ((straight.journal.rows, continued.journal.rows),
                       (straight.journal.evaluations, continued.journal.evaluations)):  # fmt: skip
        plain = [[{k: v for k, v in row.items() if k not in volatile} for row in rows] for rows in (one, other)]
        assert plain[0] == plain[1]
    on_disk = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in on_disk] == list(range(7))


def test_killed_after_a_checkpoint_it_goes_back_there(ranks: Ranks, tmp_path: Path) -> None:
    """Rows after the checkpoint are trained on again, and metrics.jsonl has no step twice."""
    recipe = recipe_of("sft", ragged(tmp_path / "rows.jsonl"), stage={"steps": 5, "batch_rows": 3},
                       checkpoint={"every_steps": 2})  # fmt: skip
    straight = stage_of(recipe, tmp_path / "straight", ranks)
    assert straight.to_the_end()
    killed = stage_of(recipe, tmp_path / "killed", ranks)
    for rows in list(killed._batches)[:3]:
        killed.train(rows)
        if killed.step == 2:
            killed.save()
    killed.close()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ver')
    again = stage_of(recipe, tmp_path / "killed", ranks)
    assert again.step == 2 and again.to_the_end()
    for name, weight in weights(straight).items():
        assert torch.equal(weights(again)[name], weight), name
    on_disk = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in on_disk] == list(range(5))


def test_it_overfits_a_hundred_packed_samples(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    """The recipe, shorter: real training."""
    sets = [f"stage.{name}={data}/sort_100.jsonl" for name in ("train", "heldout")] + ["stage.steps=70"]
    recipe = recipes.load(RECIPES / "sort_sft.toml", "sft", sets)
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    last = stage.journal.evaluations[-1]
    assert last["token_accuracy"] == 1.0 and last["loss"] < 0.05, last
    assert stage.journal.evaluations[0]["token_accuracy"] < 0.3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 70 and summary["rows"] == 7000 and summary["eval_after"]["token_accuracy"] == 1.0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = load_tokenizer(Model(path=str(tmp_path / "run" / "model")))
    row = json.loads((data / "sort_100.jsonl").read_text().splitlines()[0])
    prompt = torch.tensor([[1, *encode(tokenizer, row["prompt"])]])
    out = saved.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0, prompt.shape[1] :]) == row["response"] + "<eos>"


def test_rows_that_are_too_long(ranks: Ranks, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1=", "response": "2"},
        {"prompt": "1=", "response": "3" * 20},
        {"prompt": "4=", "response": "5"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: 24 tokens, and a sequence has at most 16; .*'drop'"):
        stage_of(recipe_of("sft", file), tmp_path / "error", ranks)
    said: list[Any] = []
    recipe = recipe_of("sft", file, stage={"too_long": "drop", "steps": 1, "batch_rows": 2})
    stage = stage_of(recipe, tmp_path / "drop", ranks, lambda kind, what: said.append((kind, what)))
    assert stage.to_the_end() and stage.data.dropped == 1
    assert ("say", "1 rows are too long and left out (stage.too_long = 'drop')") in said
    assert json.loads((tmp_path / "drop" / "summary.json").read_text())["dropped"] == 1
    with pytest.raises(UserError, match="every row is too long"):
        stage_of(recipe_of("sft", file, stage={"too_long": "drop", "max_tokens": 3}), tmp_path / "none", ranks)


def test_data_that_changed_since_the_start_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    file = ragged(tmp_path / "rows.jsonl")
    recipe = recipe_of("sft", file)
    stage_of(recipe, tmp_path / "run", ranks)
    ragged(file, 17)
    with pytest.raises(UserError, match=r"rows.jsonl has changed since .* was started"):
        stage_of(recipe, tmp_path / "run", ranks)
    with pytest.raises(UserError, match=r"stage.batch_rows: 8 -> 4"):
        stage_of(recipe_of("sft", file, stage={"batch_rows": 4}), tmp_path / "run", ranks)
    with pytest.raises(UserError, match=r"stage.steps = 2: .* was started for 4 steps"):
        stage_of(with_steps(recipe, 2), tmp_path / "run", ranks)


def on_two_ranks(rank: int, file: str, directory: str) -> tuple[bool, list[float]]:
    recipe = recipe_of("sft", Path(file), stage={"steps": 3, "batch_rows": 5, "heldout_rows": 3},
                       checkpoint={"every_steps": 2})  # fmt: skip
    directory_ = StageDirectory(Path(directory))
    if rank == 0:
        directory_.create(recipe)
    told: list[Any] = []
    complete = run(recipe, directory_, lambda kind, what: told.append((kind, what)))
    return complete, [what["loss"] for kind, what in told if kind in ("step", "evaluation")]


@pytest.mark.processes
def test_two_ranks_equal_one(ranks: Ranks, tmp_path: Path) -> None:
    """Each with all the weights; tests/stages/test_sharded.py is about ranks that share them."""
    file = ragged(tmp_path / "rows.jsonl")
    two = in_ranks(2, on_two_ranks, str(file), str(tmp_path / "two"))
    assert [complete for complete, _ in two] == [True, True] and two[1][1] == [], "only the first rank speaks"
    recipe = recipe_of("sft", file, stage={"steps": 3, "batch_rows": 5, "heldout_rows": 3})
    one: StageRun = stage_of(recipe, tmp_path / "one", ranks)
    assert one.to_the_end()
    losses = [one.journal.evaluations[0]["loss"], *(row["loss"] for row in one.journal.rows)]
    assert two[0][1][:4] == pytest.approx(losses, rel=1e-4)
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two")]
    for name, weight in both[0].items():
        torch.testing.assert_close(both[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)
