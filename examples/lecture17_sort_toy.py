"""The sort toy of CS336 lecture 17: a policy without autoregression learns to sort three numbers from a reward.

    python examples/lecture17_sort_toy.py --deltas centered_rewards --loss naive

`deltas`: rewards, centered_rewards, normalized_rewards, max_rewards. `loss`: naive is the lecture's own. Its
`unclipped` and `clipped` divide log-probs where they mean the ratio exp(logp - old), so the losses they printed (down
to -575) are not to be matched; here both take the ratio right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.algorithms.objective import Objective
from async_rl.algorithms.presets import preset
from async_rl.environments.sorting import inclusion_ordering

DELTAS = {
    "rewards": {"center": "none", "scale": "none"},
    "centered_rewards": {"center": "mean", "scale": "none"},
    "normalized_rewards": {"center": "mean", "scale": "group", "advantage_eps": 1e-5},
    "max_rewards": {"advantage": "max"},
}
LOSSES = {
    "naive": {"surrogate": "reinforce"},
    "unclipped": {"surrogate": "ppo_clip", "clip_low": 1.0, "clip_high": float("inf")},
    "clipped": {"surrogate": "ppo_clip", "clip_low": 0.01, "clip_high": 0.01},
}
PROMPTS = [[1, 0, 2], [3, 2, 4], [1, 2, 3]]


class SortModel(nn.Module):
    """Every position sees all of the prompt through its own weights, and answers on its own."""

    def __init__(self, vocabulary: int, embedding: int, prompt_length: int, response_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.encode = nn.Parameter(torch.randn(prompt_length, embedding, embedding) / embedding**0.5)
        self.decode = nn.Parameter(torch.randn(response_length, embedding, embedding) / embedding**0.5)

    def forward(self, prompts_BP: Tensor) -> Tensor:
        """[B, R, V] logits of every position of the response."""
        encoded_BD = torch.einsum("bpd,pde->be", self.embedding(prompts_BP), self.encode)
        return torch.einsum("be,red->brd", encoded_BD, self.decode) @ self.embedding.weight.T


class Step(NamedTuple):
    loss: float
    reward: float


def train(
    deltas: str = "centered_rewards", loss: str = "naive", *, epochs: int = 100, steps: int = 10, trials: int = 10
) -> Iterator[Step]:
    """One sampling per epoch, `steps` Adam steps on it; yields every step's loss and the epoch's mean reward."""
    objective = preset("reinforce", **(DELTAS[deltas] | LOSSES[loss]))
    torch.manual_seed(5)
    prompts_BP = torch.tensor(PROMPTS)
    length = prompts_BP.shape[1]
    model = SortModel(int(prompts_BP.max()) + 1, 10, length, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    group_N = torch.arange(len(PROMPTS)).repeat_interleave(trials)
    sequence_T = torch.arange(len(group_N)).repeat_interleave(length)
    for _ in range(epochs):
        with torch.no_grad():
            responses_T = sample(model, prompts_BP, trials)
            old_T = token_logps(model, prompts_BP, group_N, responses_T)  # frozen: the policy that sampled
        rewards_N = score(responses_T.view(len(group_N), length), group_N)
        advantages_N = objective.advantages(rewards_N, group_N)
        for _ in range(steps):
            logp_T = token_logps(model, prompts_BP, group_N, responses_T)
            value = toy_loss(objective, logp_T, old_T, sequence_T, advantages_N)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            yield Step(value.item(), float(rewards_N.mean()))


def sample(model: SortModel, prompts_BP: Tensor, trials: int) -> Tensor:
    """[B * trials * R] answers, drawn in the lecture's order: all trials of one position together."""
    probabilities = torch.softmax(model(prompts_BP), -1).flatten(0, 1)
    drawn = torch.multinomial(probabilities, trials, replacement=True)
    return drawn.view(*prompts_BP.shape, trials).transpose(1, 2).flatten()


def token_logps(model: SortModel, prompts_BP: Tensor, group_N: Tensor, responses_T: Tensor) -> Tensor:
    logp_TV = torch.log_softmax(model(prompts_BP), -1)[group_N].flatten(0, 1)
    return logp_TV.gather(1, responses_T[:, None]).squeeze(1)


def score(responses_NR: Tensor, group_N: Tensor) -> Tensor:
    pairs = zip(group_N.tolist(), responses_NR.tolist(), strict=True)
    return torch.tensor([float(inclusion_ordering(PROMPTS[group], response)) for group, response in pairs])


def toy_loss(objective: Objective, logp_T: Tensor, old_T: Tensor, sequence_T: Tensor, advantages_N: Tensor) -> Tensor:
    mask_T = torch.ones_like(logp_T, dtype=torch.bool)
    tokens = TokenBatch(
        logp_T=logp_T, behaviour_T=old_T, mask_T=mask_T, sequence_T=sequence_T, advantages_N=advantages_N
    )
    return objective.loss(tokens, Normaliser.of(mask_T, sequence_T, len(advantages_N))).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deltas", choices=DELTAS, default="centered_rewards")
    parser.add_argument("--loss", choices=LOSSES, default="naive")
    options = parser.parse_args()
    for index, step in enumerate(train(options.deltas, options.loss)):
        if index % 100 == 99:
            print(f"step {index + 1:4}  loss {step.loss:9.4f}  mean reward {step.reward:.3f}")


if __name__ == "__main__":
    main()
