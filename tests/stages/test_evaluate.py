"""`async-rl eval`: the numbers of a run again, from its checkpoint, and what may be evaluated at all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from async_rl.config import TinyModel
from async_rl.errors import UserError
from async_rl.models.tiny import tiny_config, tiny_tokenizer
from async_rl.stages import estimates
from async_rl.stages.evaluate import Evaluation, describe, evaluate
from async_rl.stages.target import choose

ROOT = Path(__file__).resolve().parents[2]
SORT = ROOT / "recipes" / "sort.toml"
SMALL = [
    "steps=6",
    "rollout.groups_per_step=8",
    "rollout.group_size=8",
    "generator.slots=64",
    "evaluation.tasks=40",
    "evaluation.every_steps=3",
    "checkpoint.every_steps=3",
    "optimizer.learning_rate=5e-3",
    "optimizer.warmup_steps=0",
    "staleness.max_staleness=0",  # no weights but those of the evaluated version are live before it has ended
]
TINY = TinyModel(characters="0123456789=", hidden_size=32, intermediate_size=48, max_length=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, made by the command line."""
    run = tmp_path_factory.mktemp("trained") / "run"
    sets = [argument for override in SMALL for argument in ("--set", override)]
    command = [sys.executable, "-m", "async_rl.cli", "train", str(SORT), "--run-dir", str(run), *sets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory."""
    return save(tmp_path / "model")


def save(path: Path, *, tied: bool = False, **options: Any) -> Path:
    config = tiny_config(TINY)
    config.tie_word_embeddings = tied
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(path, **options)
    tiny_tokenizer(TINY).save_pretrained(path)
    return path


def greedy(evaluation: Evaluation) -> dict[str, Any]:
    """What evaluations.jsonl holds."""
    assert evaluation.reward is not None
    return {
        "version": evaluation.version,
        "tasks": evaluation.tasks,
        "failed": evaluation.failed,
        "reward": evaluation.reward.mean,
        "metrics": {name: value.mean for name, value in evaluation.metrics.items()},
        "tokens": evaluation.tokens,
    }


@pytest.mark.processes
def test_greedy_evaluation_of_a_run_gives_the_numbers_the_run_has(trained: Path) -> None:
    recorded = {
        row["version"]: row for row in map(json.loads, (trained / "evaluations.jsonl").read_text().splitlines())
    }
    assert recorded.keys() == {0, 3, 6}
    assert greedy(evaluate(choose(trained), tasks=40)) == recorded[6]
    assert greedy(evaluate(choose(trained, checkpoint_name="v00000003"), tasks=40)) == recorded[3]
    assert recorded[3]["reward"] != recorded[6]["reward"], "another checkpoint gives other numbers"
    assert evaluate(choose(trained)).tasks == 256, "evaluation.tasks caps the evaluations of training only"
    other = choose(trained, overrides=["environment.options.digits=3", "rollout.max_new_tokens=3"])
    assert {len(task.data["digits"]) for task in evaluate(other, tasks=5).results} == {3}


@pytest.mark.processes
def test_the_command(trained: Path) -> None:
    """JSON or lines on stdout, nothing on stderr, one line and exit code 2 for wrong input."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "async_rl.cli", "eval", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    found = run(str(trained), "--tasks", "5", "--samples", "4", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert msgspec.json.decode(found.stdout, type=Evaluation).pass_at_k.keys() == {1, 2, 4}
    shown = run(str(trained), "--tasks", "5")
    assert shown.returncode == 0 and "version 6: sorting, 5 held-out tasks, greedy, float32" in shown.stdout
    wrong = run(str(trained / "checkpoints" / "v00000003"))
    assert wrong.returncode == 2 and wrong.stderr.startswith("async-rl: ") and wrong.stderr.count("\n") == 1


@pytest.mark.processes
def test_which_checkpoint_and_which_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--checkpoint v00000004: .* has v00000003, v00000006"):
        choose(trained, checkpoint_name="v00000004")
    with pytest.raises(UserError, match=r"write --recipe RECIPE.*or give the run directory and --checkpoint"):
        choose(trained / "checkpoints" / "v00000003")
    with pytest.raises(UserError, match=r"--set 'model.path=x': the weights and their config come from"):
        choose(trained, overrides=["model.path=x"])
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.json").write_bytes((trained / "config.json").read_bytes())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        choose(early)


def test_a_model_directory_under_a_recipe(directory: Path) -> None:
    """Greedy replies are those of transformers, whether the head is tied and however many files there are."""
    for path in (
        directory,
        save(directory.parent / "tied", tied=True),
        save(directory.parent / "shards", max_shard_size="8KB"),
    ):
        evaluation = evaluate(choose(path, recipe=SORT), tasks=8)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), tiny_tokenizer(TINY)
        for task in evaluation.results:
            prompt = torch.tensor([tokenizer.encode(f"<bos>{task.data['digits']}=")])
            out = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
            expected = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
            assert task.samples[0].reply == expected and task.samples[0].prompt == f"{task.data['digits']}="
    assert len(list((directory.parent / "shards").glob("*.safetensors"))) > 1


def test_samples_repeat_and_differ(directory: Path) -> None:
    target = choose(directory, recipe=SORT)
    first, second = (evaluate(target, tasks=6, samples=8) for _ in range(2))
    assert first.temperature == 1.0 and first.results == second.results
    assert any(len({sample.reply for sample in task.samples}) > 1 for task in first.results)
    assert first.pass_at_k.keys() == {1, 2, 4, 8} and first.mean_at_k == first.pass_at_k[1]
    assert evaluate(target, tasks=1, samples=2, temperature=0.5).temperature == 0.5
    train = evaluate(target, tasks=3, split="train")
    assert [task.id for task in train.results] == ["train-0", "train-1", "train-2"]
    decoded = msgspec.json.decode(msgspec.json.encode(first), type=Evaluation)
    assert decoded == first and decoded.results[0].samples[0].parts.keys() == {"distance"}
    shown = describe(first)
    assert "6 held-out tasks, 8 samples each, temperature 1, float32" in shown and "pass@8" in shown
    assert "best: heldout-" in shown and "worst: heldout-" in shown


def test_more_episodes_than_may_run_at_once(directory: Path) -> None:
    """The bound changes nothing: a group starts when there is room for it."""
    few = choose(
        directory, recipe=SORT, overrides=["generator.slots=3", "generator.queued_rollouts=0", "rollout.group_size=3"]
    )
    many = choose(directory, recipe=SORT)
    ended: list[tuple[int, int]] = []
    assert few.run.credit_rollouts == 3
    watched = evaluate(few, tasks=5, samples=4, watch=lambda done, total: ended.append((done, total)))
    assert watched.results == evaluate(many, tasks=5, samples=4).results
    assert ended[0] == (0, 20) and ended[-1] == (20, 20) and len(ended) > 3


ENVIRONMENT = """
from async_rl import Policy, Rows, Task, environment
def tasks(seed: int, heldout: int = 4):
    return Rows([{'n': str(i)} for i in range(10)], heldout=heldout, seed=seed)
@environment('mine', tasks=tasks)
async def mine(task: Task, policy: Policy) -> dict[str, float]:
    reply = await policy.chat([{'role': 'user', 'content': task['n'] + '='}])
    if int(task['n']) % 2 or BROKEN:
        raise ValueError('odd ' + task['n'])
    return {'length': len(reply.text) / 4, 'right': 1.0}
"""


def mine(directory: Path, *, broken: bool, name: str, overrides: tuple[str, ...] = ()) -> Evaluation:
    module = directory.parent / f"{name}.py"
    module.write_text(ENVIRONMENT.replace("BROKEN", str(broken)))
    sets = ["environment.name=mine", f"environment.module={module}", "environment.options={}", *overrides]
    return evaluate(choose(directory, recipe=SORT, overrides=sets))


def test_failed_episodes_are_counted_and_shown(directory: Path) -> None:
    evaluation = mine(directory, broken=False, name="odd", overrides=("environment.options.heldout=9",))
    failed = [task for task in evaluation.results if task.failed]
    assert {int(task.data["n"]) % 2 for task in failed} == {1} and evaluation.failed == len(failed) > 0
    assert evaluation.reward is not None and evaluation.reward.mean >= 1.0, "a failure is no reward of zero"
    assert evaluation.right_is == "a reward of 1 or more" and evaluation.mean_at_k is not None
    assert evaluation.mean_at_k.mean == 1.0
    shown = describe(evaluation)
    assert f"{len(failed)} of 9 episodes failed. The first, of task {failed[0].id}:" in shown
    assert "ValueError: odd" in shown and "Traceback" in shown
    nothing = mine(directory, broken=True, name="broken")
    assert (
        nothing.reward is None
        and nothing.failed == nothing.tasks == 4
        and "4 of 4 episodes failed" in describe(nothing)
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tasks": 0}, "--tasks 0: write 1 or more"),
        ({"samples": 0}, "--samples 0: write 1 or more"),
        ({"temperature": -1.0}, r"--temperature -1: write 0 \(greedy\) or more"),
        ({"temperature": 0.0, "samples": 2}, "--temperature 0: 2 greedy samples of a task are the same"),
        ({"split": "train"}, "--split train: training tasks have no end; write --tasks N"),
    ],
)
def test_wrong_arguments(directory: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        evaluate(choose(directory, recipe=SORT), **arguments)


def test_what_cannot_be_evaluated(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there is no such directory; write a run directory, or a model"):
        choose(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: config.json: No such file"):
        choose(tmp_path / "empty", recipe=SORT)
    with pytest.raises(UserError, match="is a model directory: write --recipe RECIPE, which names the environment"):
        choose(directory)
    with pytest.raises(UserError, match=r"--checkpoint v00000003: .* is a model directory; leave it out"):
        choose(directory, recipe=SORT, checkpoint_name="v00000003")
    with pytest.raises(UserError, match=r"generator.device = 'cuda:77': this machine has \d+ GPUs"):
        evaluate(choose(directory, recipe=SORT, overrides=["generator.device=cuda:77"]))
    with pytest.raises(UserError, match="the environment has no held-out tasks; write --split train --tasks N"):
        evaluate(choose(directory, recipe=SORT, overrides=["environment.options.heldout=0"]))
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        evaluate(choose(directory, recipe=SORT))
    save(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.2"):
        evaluate(choose(directory, recipe=SORT))


def test_an_unknown_override_of_a_recipe(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.tempreature = 0.5: there is no such field"):
        choose(directory, recipe=SORT, overrides=["rollout.tempreature=0.5"])
    with pytest.raises(UserError, match="No such file"):
        choose(directory, recipe=tmp_path / "missing.toml")


def test_ctrl_c_leaves_nothing_running(directory: Path) -> None:
    """In the middle of the evaluation, as a terminal does it."""

    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            os.kill(os.getpid(), signal.SIGINT)

    target = choose(directory, recipe=SORT, overrides=["generator.slots=4", "generator.queued_rollouts=0"])
    with pytest.raises(KeyboardInterrupt):
        evaluate(target, samples=16, watch=interrupt)
    for thread in threading.enumerate():
        if thread.name == "embedded-engine":  # its last step may still end
            thread.join(20)
            assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_an_interval_that_was_computed_elsewhere() -> None:
    """Newcombe 1998, table I: Wilson without continuity correction for 81 of 263 is 0.2553 to 0.3662."""
    of_263 = estimates.proportion([1.0] * 81 + [0.0] * 182)
    assert (round(of_263.low or 0, 4), round(of_263.high or 0, 4)) == (0.2553, 0.3662)
    of_29 = estimates.proportion([1.0] * 1 + [0.0] * 28)
    assert (round(of_29.low or 0, 4), round(of_29.high or 0, 4)) == (0.0061, 0.1718)
    assert estimates.mean([2.0]) == estimates.Estimate(2.0, None, None, None)
    two = estimates.mean([1.0, 3.0])
    assert two.mean == 2.0 and two.standard_error == 1.0 and two.low == pytest.approx(2 - 1.959964)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 6))
def test_estimates_are_proportions(right: list[list[bool]], samples: int) -> None:
    """Within [0, 1], around the mean; pass@k grows with k where every task has as many samples."""
    right = [(task * samples)[:samples] for task in right]
    passes = estimates.passes(right, samples)
    assert max(passes) == samples and sorted(passes) == list(passes)
    means = [value.mean for value in passes.values()]
    assert means == sorted(means) and means[-1] == pytest.approx(sum(map(any, right)) / len(right))
    for value in passes.values():
        assert value.low is not None and value.high is not None
        assert 0 <= value.low <= value.mean + 1e-12 and value.mean <= value.high + 1e-12 <= 1 + 1e-12
    whole = estimates.over_tasks([[float(one) for one in task] for task in right])
    assert whole.mean == pytest.approx(passes[1].mean) and whole.low == pytest.approx(passes[1].low)
