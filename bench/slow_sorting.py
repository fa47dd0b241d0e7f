"""Sorting whose answers take long and unequal times, as those of a reasoning model do: for staleness_study.py.

A training rollout has a duration, drawn from a lognormal distribution by a hash of (seed, task, how many rollouts of
this task began before): the same in every arm of a study. Half of the answer is sampled at its begin, the other half in
the middle, and at its end it is scored. Held-out tasks take no time.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from typing import Any

from async_rl import Policy, Reward, Task, environment
from async_rl.environments.sorting import SortingTasks, distance

TICK_S = 0.1


class SlowSortingTasks(SortingTasks):
    """As SortingTasks, and

    mean_s: mean duration of a rollout in seconds.
    sigma: of its logarithm.
    """

    def __init__(self, seed: int, digits: int = 4, heldout: int = 256, mean_s: float = 0.2, sigma: float = 0.5) -> None:
        super().__init__(seed, digits=digits, heldout=heldout)
        self._slow = {"seed": seed, "mean_s": mean_s, "sigma": sigma}

    def train(self, index: int) -> dict[str, Any]:
        return {**super().train(index), **self._slow}


_begun: Counter[str] = Counter()
"""Rollouts of each task, in this process."""


def duration_s(task: Task) -> float:
    if "mean_s" not in task.data:
        return 0.0
    member, _begun[task.id] = _begun[task.id], _begun[task.id] + 1
    mean_s, sigma = task["mean_s"], task["sigma"]
    draw = random.Random(f"{task['seed']}/{task.id}/{member}")
    return mean_s * math.exp(draw.gauss(0.0, sigma) - sigma**2 / 2)


async def _sleep(seconds: float) -> None:
    """To the next tick of the clock: what ends at nearly the same time shares its messages and decode steps."""
    if seconds > 0:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(math.ceil((now + seconds) / TICK_S) * TICK_S - now)


@environment("slow_sorting", tasks=SlowSortingTasks)
async def slow_sorting(task: Task, policy: Policy) -> Reward:
    digits: str = task["digits"]
    half_s, text = duration_s(task) / 2, ""
    for until in (len(digits) // 2, len(digits)):
        said = [{"role": "assistant", "content": text}] if text else []
        reply = await policy.chat([{"role": "user", "content": f"{digits}="}, *said], max_new_tokens=until - len(text))
        text += reply.text
        await _sleep(half_s)
        if len(text) < until:  # it stopped early, or said something that is no character
            break
    prompt = [int(digit) for digit in digits]
    response = [int(character) if character.isdigit() else -1 for character in text]
    value = distance(prompt, response) / len(prompt)
    return Reward(value, {}, {"exact": float(response == sorted(prompt))})
