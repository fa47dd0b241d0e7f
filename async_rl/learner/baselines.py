"""Pure: the groups that the advantages of a step are relative to, as rows of rewards.

Axis B: the rollouts of the step and, where their baseline has members that are not in this step, one row for each of
those, without tokens.

    rollout                                   | its group of rows
    ------------------------------------------+-------------------------------------------------------------
    without baseline                          | the rollouts of its group in this step that have none either
    with one that it is part of               | that baseline, shared by all who are part of it
    with one that it is not part of: it ended | that baseline and itself, for itself alone
    after the group was opened                |

So the advantage of rollout i is the formula of the preset in the group S + i, where S is the set of members that had
ended when the group was opened: the same function of its own reward and of those of the others in S, whether i ended
before or after. Its own tokens, and with them its own length, decide nothing (docs/staleness.md).
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from async_rl.wire.messages import TrainRollout


@dataclass(frozen=True, slots=True)
class BaselineRows:
    """Rows of a group are in order of member, so that a group gives the same sums whoever of it is in the step."""

    rewards_B: npt.NDArray[np.float32]
    """NaN = missing."""
    group_B: npt.NDArray[np.int64]
    """Numbers from 0, one per group of rows."""
    in_step_B: npt.NDArray[np.bool_]
    """False: only part of a baseline. Statistics over the whole batch leave it out."""
    row_N: npt.NDArray[np.int64]
    """The row of each rollout of the step."""

    def others_N(self) -> npt.NDArray[np.int64]:
        """With how many others the reward of each rollout is compared."""
        return np.bincount(self.group_B)[self.group_B[self.row_N]] - 1


def baseline_rows(rollouts: Sequences[TrainRollout]) -> BaselineRows:
    """Rollouts of a group that were opened together carry the same baseline."""
    groups: dict[tuple[int, ...], dict[int, float]] = {}
    key_N: list[tuple[int, ...]] = []
    for rollout in rollouts:
        key = (rollout.group_id, *sorted(rollout.baseline))
        if rollout.baseline and rollout.member not in rollout.baseline:
            key = (*key, -1 - rollout.member)  # no member has such a number: this group is its own
        rewards = groups.setdefault(key, dict(rollout.baseline))
        rewards[rollout.member] = rollout.reward
        key_N.append(key)
    rows = {(key, member): reward for key, rewards in groups.items() for member, reward in sorted(rewards.items())}
    numbers = {row: number for number, row in enumerate(rows)}
    places = ((key, rollout.member) for key, rollout in zip(key_N, rollouts, strict=True))
    row_N = np.fromiter((numbers[place] for place in places), np.int64, len(rollouts))
    in_step_B = np.zeros(len(rows), np.bool_)
    in_step_B[row_N] = True
    sizes = np.fromiter((len(rewards) for rewards in groups.values()), np.int64, len(groups))
    return BaselineRows(
        rewards_B=np.fromiter(rows.values(), np.float32, len(rows)),
        group_B=np.repeat(np.arange(len(groups)), sizes),
        in_step_B=in_step_B,
        row_N=row_N,
    )
