"""A reward model of the sort toy, from preferences, with the learner's own parts: `recipes/sort_ppo.toml` can take it.

    python examples/sort_reward_model.py models/sort_reward
    async-rl train recipes/sort_ppo.toml --set reward_model.path=models/sort_reward --set reward_model.replaces=true \\
        --set reward_model.weight=0.1

Two answers to a prompt, of which the one with more digits in their right places is preferred (Bradley-Terry). Answers
are what a policy says on its way from noise to sorting: a sorted answer with some of its tokens replaced by random
ones, special ones included, since whatever the model has never seen is where a policy will find its reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from async_rl import config, recipes
from async_rl.algorithms.reward_model import normalise_scores, pair_loss
from async_rl.config import Optimizer
from async_rl.environments.sorting import distance
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Optimisation
from async_rl.learner.packing import Ints, PackedTokens, Sequences, pack_sequences
from async_rl.learner.scalar import PackedScalar
from async_rl.models.loading import load_tokenizer
from async_rl.models.text import encode_chat

RECIPE = Path(__file__).parents[1] / "recipes" / "sort_ppo.toml"
PAIRS = 128
"""In one step."""


class Answers(NamedTuple):
    """Two to each prompt, one after the other; axis S all of them."""

    tokens: Sequences
    right_S: Ints
    """Digits in their right places: what the environment pays, times the length."""


class Answerer:
    """Draws prompts and answers."""

    def __init__(self, run: config.Run, seed: int) -> None:
        tokenizer = load_tokenizer(run.model)
        self._digits = run.environment.options["digits"]
        self._tokens = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
        self._prompt = encode_chat(tokenizer, [{"role": "user", "content": "0" * self._digits + "="}])
        self._eos, self._vocabulary = tokenizer.eos_token_id, len(tokenizer)
        self._rng = np.random.default_rng(seed)

    def draw(self, pairs: int) -> Answers:
        rows: list[npt.NDArray[np.int64]] = []
        right: list[int] = []
        for _ in range(pairs):
            digits = self._rng.integers(0, 10, self._digits).tolist()
            prompt = np.array(self._prompt)
            prompt[-1 - self._digits : -1] = [self._tokens[digit] for digit in digits]
            for _ in range(2):
                answer = self._answer(sorted(digits))
                rows.append(np.concatenate([prompt, answer]))
                said = [self._tokens.index(token) if token in self._tokens else -1 for token in answer.tolist()]
                right.append(distance(digits, said))
        length_S = np.array([len(row) for row in rows])
        tokens_A = np.concatenate(rows).astype(np.int32)
        return Answers(Sequences.ending(tokens_A, length_S, np.full(len(rows), len(self._prompt))), np.array(right))

    def _answer(self, sorted_digits: list[int]) -> npt.NDArray[np.int64]:
        """Ends with its first end token, as one that is sampled does."""
        answer = np.array([self._tokens[digit] for digit in sorted_digits])
        noise = self._rng.random(len(answer)) < self._rng.random()
        answer[noise] = self._rng.integers(0, self._vocabulary, int(noise.sum()))
        ends = np.flatnonzero(answer == self._eos)
        return answer[: ends[0] + 1] if len(ends) else answer


def packed(answers: Answers) -> tuple[PackedTokens, Ints]:
    """The prompt of a pair is fed once. Also: the place in S of each score."""
    everyone = np.arange(len(answers.right_S))
    pack = pack_sequences(answers.tokens, everyone, everyone // 2 + 1)
    return pack.tokens, pack.place_K


def scores(model: PackedScalar, answers: Answers) -> torch.Tensor:
    """[pairs, 2]"""
    tokens, place_K = packed(answers)
    return torch.zeros(len(answers.right_S)).index_put((torch.from_numpy(place_K),), model(tokens)).view(-1, 2)


def preferred(scores_P2: torch.Tensor, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the better and the worse answer of each pair that is no tie."""
    right_P2 = torch.from_numpy(answers.right_S).view(-1, 2)
    decided = right_P2[:, 0] != right_P2[:, 1]
    first = (right_P2[:, 0] > right_P2[:, 1])[decided]
    one, other = scores_P2[decided].unbind(1)
    return torch.where(first, one, other), torch.where(first, other, one)


def train(model: PackedScalar, ranks: Ranks, answerer: Answerer, steps: int, rate: float) -> Iterator[float]:
    """Accuracy on the pairs of each step, before it is trained on them."""
    schedule = Optimizer(learning_rate=rate, warmup_steps=20, decay_steps=steps // 3, betas=(0.9, 0.999))
    optimisation = Optimisation(model.parameters(), schedule, steps, ranks)
    for step in range(steps):
        answers = answerer.draw(PAIRS)

        def loss(answers: Answers = answers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            found = pair_loss(*preferred(scores(model, answers), answers))
            return found.loss_B.mean(), {"accuracy": found.accuracy}

        totals = optimisation.accumulate([loss])
        optimisation.update(step, totals)
        yield totals.values["accuracy"]


@torch.no_grad()
def normalise(model: PackedScalar, answerer: Answerer) -> float:
    """The bias that makes these answers score 0 on average; accuracy on them."""
    answers = answerer.draw(1024)
    found = scores(model, answers)
    _, bias = normalise_scores(found.flatten(), found.flatten())
    model.bias = float(bias)
    return float(pair_loss(*preferred(found, answers)).accuracy)


def make(directory: Path, *, steps: int, rate: float = 2e-3, seed: int = 1) -> float:
    """Train one and save it. Returns the share of unseen pairs that it orders as the environment would."""
    torch.set_num_threads(1)
    run, ranks = recipes.load(RECIPE), Ranks.start(torch.device("cpu"))
    try:
        model = PackedScalar.load(run.model, seed=seed)
        for step, accuracy in enumerate(train(model, ranks, Answerer(run, seed), steps, rate), 1):
            if step % 50 == 0:
                print(f"step {step}/{steps}  accuracy {accuracy:.3f}", flush=True)
        accuracy = normalise(model, Answerer(run, seed + 1))
        model.save(directory, load_tokenizer(run.model))
    finally:
        ranks.stop()
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    print(f"accuracy on unseen pairs {make(given.directory, steps=given.steps):.3f}; saved in {given.directory}")
