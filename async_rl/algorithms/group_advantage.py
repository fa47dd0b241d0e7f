"""Advantages of rollouts relative to their group (no gradient).

GRPO (Shao et al. 2024, arXiv:2402.03300, Sec. 4.1): (r - mean) / (std + eps). Dr. GRPO (Liu et al. 2025, 2503.20783)
and Kimi k1.5: r - mean. RLOO (Ahmadian et al. 2024, 2402.14740): r - mean of the others. Batch std (LitePPO,
2508.08221): (r - group mean) / (std of the batch + eps). MaxRL (2602.02710): (r - mean) / mean. REINFORCE++
(2501.03262): center "batch", the whole batch as one group.

The lecture notes call the group mean a "batch baseline" (it is a group baseline: only the prompt's own samples enter
it) and equate GRPO with online rejection-sampling fine-tuning (a different method: preset `raft`); we follow the
papers. Dividing by std is no baseline: it overweights too easy and too hard prompts. Dr. GRPO's r - mean is (G-1)/G
times RLOO because the mean contains the sample itself; only RLOO is exactly unbiased, which the notes leave out.
eps is 1e-4 in TRL and in one set of notes, 1e-5 in the lecture code and AReaL, 1e-6 in CS336 and verl (ours); ddof is
1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Center = Literal["mean", "loo", "batch", "none"]
Scale = Literal["group", "batch", "group_mean", "none"]


def group_advantage(
    rewards_N: Tensor,
    group_N: Tensor,
    *,
    center: Center = "mean",
    scale: Scale = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    in_batch_N: Tensor | None = None,
) -> Tensor:
    """[N] advantage of each rollout; groups may have any size and order.

    in_batch_N: [N] bool, False = a rollout of another batch, here only because it is part of a group. Groups count it;
    center "batch" and scale "batch" do not, and under center "batch" it gets 0. None = all are of this batch.

    A missing reward (NaN: the judge failed) is left out of every statistic and gets 0. A group whose rewards are all
    equal gets exactly 0: fp32 rounding of the mean would otherwise be divided by eps (8 x 0.7 leaks 5.6e-2). A lone
    rollout gets 0 as well (verl returns its raw reward). Statistics are in fp64.
    """
    group_N = torch.zeros_like(group_N) if center == "batch" else torch.unique(group_N, return_inverse=True)[1]
    in_batch_N = torch.ones_like(rewards_N, dtype=torch.bool) if in_batch_N is None else in_batch_N
    valid_N = ~rewards_N.isnan()
    valid_N = valid_N & in_batch_N if center == "batch" else valid_N
    reward_N = rewards_N.where(valid_N, 0.0).double()
    if center == "none" and scale == "none":
        return reward_N.to(rewards_N.dtype)
    num_groups = int(group_N.max()) + 1 if group_N.numel() else 0

    def per_group(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(num_groups).index_add(0, group_N, x_N)[group_N]

    count_N = per_group(valid_N.double())
    mean_N = per_group(reward_N) / count_N.clamp(min=1)
    spread_N = group_spread(reward_N, valid_N, group_N, num_groups)
    deviation_N = (reward_N - mean_N).where(valid_N, 0.0)
    match center:
        case "mean" | "batch":
            advantage_N = deviation_N
        case "loo":
            advantage_N = deviation_N * count_N / (count_N - 1).clamp(min=1)
        case "none":
            advantage_N = reward_N
    match scale:
        case "group":
            variance_N = per_group(deviation_N.square()) / (count_N - ddof).clamp(min=1)
            advantage_N = advantage_N / (variance_N.sqrt() + eps)
        case "batch":
            batch = reward_N[valid_N & in_batch_N]
            advantage_N = advantage_N / (batch.std(correction=ddof) + eps) if len(batch) > ddof else advantage_N
        case "group_mean":  # defined for rewards >= 0; a group that never succeeds carries no signal
            advantage_N = (advantage_N / mean_N).where(mean_N > 0, 0.0)
        case "none":
            pass
    return advantage_N.where(valid_N & (spread_N > 0), 0.0).to(rewards_N.dtype)


def max_advantage(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """[N] r where r is the best of its group, else 0 (lecture 17's `max_rewards`; RAFT's best of K). NaN gives 0."""
    group_N = torch.unique(group_N, return_inverse=True)[1]
    valid_N = ~rewards_N.isnan()
    num_groups = int(group_N.max()) + 1 if group_N.numel() else 0
    best_N = group_extreme(rewards_N, valid_N, group_N, num_groups, "amax")
    return rewards_N.where(valid_N & (rewards_N == best_N), 0.0)


def group_spread(reward_N: Tensor, valid_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """[N] highest minus lowest known reward of each rollout's group; exactly 0 where they are equal."""
    highest_N = group_extreme(reward_N, valid_N, group_N, num_groups, "amax")
    return highest_N - group_extreme(reward_N, valid_N, group_N, num_groups, "amin")


def group_extreme(
    x_N: Tensor, valid_N: Tensor, group_N: Tensor, num_groups: int, reduce: Literal["amax", "amin"]
) -> Tensor:
    """[N] highest or lowest known reward of each rollout's group."""
    neutral = -torch.inf if reduce == "amax" else torch.inf
    start = x_N.new_full((num_groups,), neutral)
    return start.scatter_reduce(0, group_N, x_N.where(valid_N, neutral), reduce)[group_N]
