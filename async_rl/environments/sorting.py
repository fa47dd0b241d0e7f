"""Sort digits: the toy of Stanford CS336 (2025) lecture 17, with both of its rewards.

The prompt is the digits and "=", the completion should be the digits in ascending order: `3102=` -> `0123`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from async_rl.environments.api import Policy, Reward, environment
from async_rl.wire.messages import Task

HELDOUT_SHARE = 10
"""One prompt in so many is held out, by its hash, so that training never sees it whatever the seed."""

REWARDS = ("distance", "inclusion_ordering")


def distance(prompt: Sequence[int], response: Sequence[int]) -> int:
    """How many positions of the response hold what the sorted prompt holds there.

    >>> distance([3, 1, 0, 2], [7, 2, 2, 5])
    1
    """
    return sum(right == said for right, said in zip(sorted(prompt), response, strict=False))


def inclusion_ordering(prompt: Sequence[int], response: Sequence[int]) -> int:
    """A point for every prompt element that occurs in the response, and for every adjacent pair in order.

    A constant response collects all of the ordering points: a reward to be hacked.

    >>> inclusion_ordering([3, 1, 0, 2], [7, 2, 2, 5])
    3
    """
    included = sum(element in response for element in prompt)
    ordered = sum(a <= b for a, b in pairwise(response))
    return included + ordered


class SortingTasks:
    """Random digit strings. A prompt belongs to the held-out tasks or to training by its hash, never to both.

    Args:
        digits: length of the prompt, 2 to 32.
        reward: "distance" or "inclusion_ordering"; both are divided by their maximum.
        heldout: how many held-out tasks there are.
    """

    def __init__(self, seed: int, digits: int = 4, reward: str = "distance", heldout: int = 256) -> None:
        if not 2 <= digits <= 32:
            raise ValueError(f"digits = {digits}: write 2 to 32")
        if reward not in REWARDS:
            raise ValueError(f"reward = {reward!r}: write {' or '.join(REWARDS)}")
        self._seed, self._digits, self._reward, self._num_heldout = seed, digits, reward, heldout

    def train(self, index: int) -> dict[str, Any]:
        return self._draw(f"{self._seed}/{index}", held_out=False)

    def heldout(self) -> list[dict[str, Any]]:
        return [self._draw(f"heldout/{i}", held_out=True) for i in range(self._num_heldout)]

    def _draw(self, key: str, *, held_out: bool) -> dict[str, Any]:
        generator = random.Random(key)
        while True:
            digits = "".join(generator.choices("0123456789", k=self._digits))
            if (zlib.crc32(digits.encode()) % HELDOUT_SHARE == 0) == held_out:
                return {"digits": digits, "reward": self._reward}


@environment("sorting", tasks=SortingTasks)
async def sorting(task: Task, policy: Policy) -> Reward:
    """One turn. A character that is no digit is a wrong element, not an error."""
    digits: str = task["digits"]
    reply = await policy.chat([{"role": "user", "content": f"{digits}="}], max_new_tokens=len(digits))
    prompt = [int(digit) for digit in digits]
    response = [int(character) if character.isdigit() else -1 for character in reply.text]
    if task["reward"] == "distance":
        value = distance(prompt, response) / len(prompt)
    else:
        value = inclusion_ordering(prompt, response) / (2 * len(prompt) - 1)
    return Reward(value, {task["reward"]: value}, {"exact": float(response == sorted(prompt))})
