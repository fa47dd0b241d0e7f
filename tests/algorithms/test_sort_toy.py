"""The lecture-17 toy through our functions equals the lecture's own arithmetic, step by step, in its naive form."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "lecture17_sort_toy.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("lecture17_sort_toy", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lecture_deltas(mode, rewards):
    """[prompt, trial], as the lecture writes them."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return {
        "rewards": rewards,
        "centered_rewards": centred,
        "normalized_rewards": centred / (rewards.std(-1, keepdim=True) + 1e-5),
        "max_rewards": rewards * (rewards == rewards.max(-1, keepdim=True).values),
    }[mode]


def lecture_run(toy, mode, epochs):
    torch.manual_seed(5)
    prompts = torch.tensor(toy.PROMPTS)
    model = toy.SortModel(int(prompts.max()) + 1, 10, 3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        drawn = torch.multinomial(torch.softmax(model(prompts).flatten(0, 1), -1), 10, replacement=True)
        responses = drawn.view(3, 3, 10).transpose(1, 2)  # prompt, trial, position
        rewards = torch.tensor(
            [
                [
                    sum(x in answer for x in prompt) + sum(x <= y for x, y in pairwise(answer))
                    for answer in responses[i].tolist()
                ]
                for i, prompt in enumerate(toy.PROMPTS)
            ],
            dtype=torch.float32,
        )
        deltas = lecture_deltas(mode, rewards)
        for _ in range(10):
            logps = torch.log_softmax(model(prompts), -1)[:, None].expand(3, 10, 3, -1)
            loss = -(logps.gather(-1, responses[..., None])[..., 0] * deltas[..., None]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item(), rewards.mean().item()


@pytest.mark.parametrize("mode", ["rewards", "centered_rewards", "normalized_rewards", "max_rewards"])
def test_naive_run_repeats_the_lecture(toy, mode):
    ours, theirs = list(toy.train(mode, epochs=20)), list(lecture_run(toy, mode, 20))
    assert len(ours) == 200
    for step, (loss, reward) in zip(ours, theirs, strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-3, abs=2e-4)
        assert step.reward == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize("mode", ["rewards", "centered_rewards", "normalized_rewards"])
@pytest.mark.parametrize("loss", ["unclipped", "clipped"])
def test_the_other_losses_start_at_the_right_ratio(toy, mode, loss):
    steps = list(toy.train(mode, loss, epochs=1))
    first = -steps[0].reward if mode == "rewards" else 0.0  # at ratio 1 the loss is minus the mean advantage
    assert steps[0].loss == pytest.approx(first, abs=1e-5)
    assert all(abs(step.loss) < 10 for step in steps)
