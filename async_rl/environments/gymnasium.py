"""Environments of the Gymnasium API that speak text: observations are what the user says, replies are actions.

    [environment]
    name = "gymnasium"

    [environment.options]
    make = "my_package.games:GuessNumber-v0"
    arguments = { highest = 100 }
    turns = 8
    answer = "last_number"

The reward of a rollout is the sum of the environment's rewards. An action the environment does not have is told so, and
costs a turn. It runs in a thread: one that blocks stops no other episode.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from typing import Any

from async_rl.environments.api import Policy, Reward, environment
from async_rl.errors import require
from async_rl.rewards.answers import EXTRACTORS, extract
from async_rl.wire.messages import Task

NO_ACTION = "That is no valid action."
SUCCESS = ("is_success", "success")
"""Where environments say in `info` whether the episode was won; the metric `exact`."""


class GymnasiumTasks:
    """Seeds of one environment: even ones are trained on, odd ones are held out.

    Args:
        make: the id that `gymnasium.make` takes; "module:id" imports the module that registers it first.
        arguments: further ones of `gymnasium.make`.
        heldout: how many held-out tasks there are.
        turns: so many actions at most, invalid ones included.
        system: a system prompt; none if empty.
        answer: where the action is in a reply: "text" (all of it), "last_line", "tag" (<answer>...</answer>), "boxed",
            "last_number" and the others of rewards.answers.
    """

    def __init__(
        self,
        seed: int,
        make: str,
        arguments: Mapping[str, Any] | None = None,
        heldout: int = 64,
        turns: int = 16,
        system: str = "",
        answer: str = "text",
    ) -> None:
        if heldout < 0:
            raise ValueError(f"heldout = {heldout}: write 0 or more")
        if turns < 1:
            raise ValueError(f"turns = {turns}: write at least 1")
        if answer not in EXTRACTORS:
            raise ValueError(f"answer = {answer!r}: write one of {', '.join(EXTRACTORS)}")
        self._seed, self._num_heldout = seed, heldout
        given = dict(arguments or {})
        self._constant = {"make": make, "arguments": given, "turns": turns, "system": system, "answer": answer}
        _try(make, given)

    def train(self, index: int) -> dict[str, Any]:
        return {**self._constant, "seed": _draw(f"{self._seed}/{index}")}

    def heldout(self) -> list[dict[str, Any]]:
        return [{**self._constant, "seed": _draw(f"heldout/{index}") | 1} for index in range(self._num_heldout)]


def _draw(key: str) -> int:
    """An even seed below 2^31."""
    return zlib.crc32(key.encode()) >> 2 << 1


def _make(make: str, arguments: Mapping[str, Any]) -> Any:
    gymnasium: Any = require("gymnasium", "gymnasium", 'environment.name = "gymnasium"')
    # The checker asserts what we check, and would fail the rollout instead of the action.
    return gymnasium.make(make, disable_env_checker=True, **arguments)


def _try(make: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError: there is no such environment, or it does not speak text."""
    gymnasium: Any = require("gymnasium", "gymnasium", 'environment.name = "gymnasium"')
    try:
        made = _make(make, arguments)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"make = {make!r}, arguments = {dict(arguments)}: {reason}") from error
    try:
        observation, _ = made.reset(seed=0)
        if not isinstance(observation, str):
            raise ValueError(
                f"make = {make!r}: it observes {type(observation).__name__}; only text can be said to the policy: "
                "wrap it (gymnasium.ObservationWrapper) so that it observes str"
            )
        if isinstance(made.action_space, gymnasium.spaces.Box):
            raise ValueError(
                f"make = {make!r}: its actions are {made.action_space}; write one with text or numbered ones"
            )
    finally:
        made.close()


def action(space: Any, answer: str | None) -> Any:
    """What `step` takes: a text, or a number of a Discrete space. None: the answer is none of its actions."""
    if answer is None:
        return None
    if hasattr(space, "n") and hasattr(space, "start"):
        try:
            answer_or_number: Any = int(answer)
        except ValueError:
            return None
    else:
        answer_or_number = answer
    return answer_or_number if space.contains(answer_or_number) else None


@environment("gymnasium", tasks=GymnasiumTasks)
async def gymnasium(task: Task, policy: Policy) -> Reward:
    """Turn by turn until the environment ends, or `turns` are over."""
    made = await asyncio.to_thread(_make, task["make"], task["arguments"])
    try:
        observation, info = await asyncio.to_thread(made.reset, seed=task["seed"])
        messages: list[dict[str, Any]] = [{"role": "system", "content": task["system"]}] if task["system"] else []
        messages.append({"role": "user", "content": observation})
        total, turns, invalid, over = 0.0, 0, 0, False
        while not over and turns < task["turns"]:
            reply = await policy.chat(messages)
            turns += 1
            chosen = action(made.action_space, extract(task["answer"], reply.content))
            if chosen is None:
                observation, invalid = NO_ACTION, invalid + 1
            else:
                observation, reward, terminated, truncated, info = await asyncio.to_thread(made.step, chosen)
                total, over = total + float(reward), bool(terminated or truncated)
            messages += [reply.message, {"role": "user", "content": str(observation)}]
    finally:
        await asyncio.to_thread(made.close)
    metrics = {"turns": float(turns), "invalid": float(invalid), "finished": float(over)}
    won = next((float(info[name]) for name in SUCCESS if name in info), None)
    return Reward(total, metrics=metrics if won is None else {**metrics, "exact": won})
