"""Adapters: only they are trained, what leaves the learner has them added, and they come back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from async_rl import recipes
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Lora, Model, Optimizer, Run
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner
from async_rl.models.loading import build_model
from tests.many_ranks import in_ranks

SORT = Path(__file__).resolve().parents[2] / "recipes" / "sort.toml"


def lora_run(**options: Any) -> Run:
    learner = LearnerConfig(lora=Lora(rank=4, alpha=8, **options))
    return tiny_run(learner=learner, optimizer=Optimizer(learning_rate=1e-2, eps=1e-4))


def train(learner: Learner, steps: int) -> list[float]:
    return [learner.train(message(ragged_rollouts(seed=3), step=learner.version))["loss"] for _ in range(steps)]


def snapshot(learner: Learner) -> dict[str, Tensor]:
    out = torch.empty(learner.layout.nbytes, dtype=torch.uint8)
    learner.snapshot(out)
    return learner.layout.views(out)


def test_only_adapters_change_and_what_is_published_has_them_added(ranks: Ranks, tmp_path: Path) -> None:
    run = lora_run(targets=["q_proj", "down_proj"])
    learner = Learner(run, tmp_path, ranks)
    plain = dict(build_model(run.model, seed=run.seed).named_parameters())
    before = snapshot(learner)
    assert before.keys() == plain.keys() and all(torch.equal(before[name], plain[name]) for name in plain)

    losses = train(learner, 3)
    assert losses[0] != losses[1]
    after = snapshot(learner)
    changed = {name for name in plain if not torch.equal(after[name], plain[name])}
    assert changed == {name for name in plain if "q_proj" in name or "down_proj" in name}
    trained = [name for name, parameter in learner.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) and len(trained) == 2 * 2 * 2

    merged = build_model(run.model, seed=run.seed)
    merged.load_state_dict(after)
    tokens = torch.tensor([[1, 5, 7, 9, 4]])
    expected = merged(tokens).logits
    learner.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(learner.model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_checkpoint_has_both_and_resumes_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    run = lora_run()
    straight, first = Learner(run, tmp_path / "straight", ranks), Learner(run, tmp_path / "stopped", ranks)
    expected = train(straight, 4)
    found = train(first, 2)
    path = first.save_checkpoint()
    merged, published = AutoModelForCausalLM.from_pretrained(path), snapshot(first)
    assert all(torch.equal(parameter, published[name]) for name, parameter in merged.named_parameters())
    peft_model = PeftModel.from_pretrained(build_model(run.model, seed=run.seed), str(path / "adapter"))
    for name, parameter in peft_model.merge_and_unload().named_parameters():
        torch.testing.assert_close(parameter, published[name], atol=1e-6, rtol=1e-6)
    second = Learner(run, tmp_path / "stopped", ranks)
    assert found + train(second, 2) == expected
    for name, tensor in snapshot(second).items():
        assert torch.equal(tensor, snapshot(straight)[name]), name


def test_adapters_alone(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(lora_run(save_merged=False), tmp_path, ranks)
    train(learner, 1)
    path = learner.save_checkpoint()
    assert not (path / "model.safetensors").exists() and (path / "adapter" / "adapter_config.json").exists()
    again = Learner(lora_run(save_merged=False), tmp_path, ranks)
    assert all(torch.equal(tensor, snapshot(learner)[name]) for name, tensor in snapshot(again).items())


def test_bad_recipes_are_named(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learner\.lora\.targets: 'query' is no layer .* write some of down_proj, "):
        Learner(lora_run(targets=["query"]), tmp_path, ranks)
    with pytest.raises(UserError, match=r"learner\.lora\.rank = 0: write a number above 0"):
        recipes.load(SORT, ["learner.lora={rank=0}"])
    with pytest.raises(UserError, match=r"reference\.refresh_steps = 3: a reference beside learner\.lora stays"):
        recipes.load(SORT, ["learner.lora={rank=4}", "reference.refresh_steps=3"])


def one_rank(rank: int, directory: str, run: Run) -> Any:
    learner = Learner(run, Path(directory))
    if rank > 0:
        learner.follow()
        learner.close()
        return None
    everyone = list(range(16))
    plan = [[everyone[:9]], [everyone[9:]]]
    losses = [learner.train(message(ragged_rollouts(seed=3), plan, step=learner.version))["loss"] for _ in range(2)]
    weights = {name: tensor.numpy().copy() for name, tensor in snapshot(learner).items()}
    learner.save_checkpoint()
    learner.close()
    return losses, weights


@pytest.mark.processes
def test_sharded_adapters_equal_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    run = lora_run()
    one = Learner(run, tmp_path / "one", ranks)
    losses = train(one, 2)
    sharded = msgspec.structs.replace(run, learner=msgspec.structs.replace(run.learner, sharding="full", ranks=2))
    found, weights = in_ranks(2, one_rank, str(tmp_path / "two"), sharded)[0]
    assert found == pytest.approx(losses, abs=1e-6)
    for name, tensor in snapshot(one).items():
        np.testing.assert_allclose(weights[name], tensor.numpy(), atol=1e-5)
    resumed = snapshot(Learner(run, tmp_path / "two", ranks))
    assert all(np.array_equal(weights[name], tensor.numpy()) for name, tensor in resumed.items())
    saved = Model(path=str(tmp_path / "two" / "checkpoints" / "v00000002"))
    assert all(np.array_equal(weights[n], p.detach().numpy()) for n, p in build_model(saved, seed=0).named_parameters())
