"""Gymnasium environments that speak text, through gymnasium itself; a script plays the model's part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import pytest

from async_rl.config import Environment
from async_rl.environments.api import find, make_tasks
from async_rl.errors import UserError
from async_rl.rollout.reply import RecordedReply
from async_rl.simulate.cluster import NumberText
from async_rl.wire.messages import Task

GYMNASIUM = find(Environment(name="gymnasium"))


class Guess(gym.Env[str, Any]):
    """A number is guessed; each guess costs, a hit pays."""

    def __init__(self, highest: int = 9, numbered: bool = False, shows: str = "text") -> None:
        digits = gym.spaces.Text(max_length=3, charset="0123456789")
        self.action_space = gym.spaces.Discrete(highest + 1) if numbered else digits
        self.observation_space = gym.spaces.Text(max_length=60)
        self._highest, self._shows = highest, shows
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._secret = int(self.np_random.integers(self._highest + 1))
        return f"0 to {self._highest}?" if self._shows == "text" else 3, {}

    def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
        guess = int(action)
        if guess == self._secret:
            return "yes", 1.0, True, False, {"success": True}
        return "higher" if guess < self._secret else "lower", -0.1, False, False, {"success": False}


gym.register("Guess-v0", entry_point=Guess, max_episode_steps=5)
gym.register("Box-v0", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv")


class Written(NumberText):
    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Player:
    """Halves the range, as it is told, except for the replies it is given first."""

    def __init__(self, *first: str) -> None:
        self.first, self.heard = list(first), list[str]()
        self.low, self.high = 0, 9

    async def chat(self, messages: Sequence[Any], **options: Any) -> RecordedReply:
        said = messages[-1]["content"]
        self.heard.append(said)
        if said in ("higher", "lower"):
            middle = (self.low + self.high) // 2
            self.low, self.high = (middle + 1, self.high) if said == "higher" else (self.low, middle - 1)
        text = self.first.pop(0) if self.first else f"I say {(self.low + self.high) // 2}"
        tokens = [ord(character) for character in text]
        return RecordedReply(Written(), tokens, [0.0] * len(tokens), "eos", len(self.heard), 1, False, False, ())


def tasks(**options: Any) -> Any:
    return make_tasks(GYMNASIUM, {"make": "Guess-v0", "answer": "last_number", **options}, seed=1)


def play(real: Any, player: Any, data: Any) -> Any:
    return real(GYMNASIUM.episode(Task("t", data), player))


@pytest.mark.parametrize("numbered", [False, True])
def test_an_episode_is_played_to_its_end(real: Any, numbered: bool) -> None:
    player = Player()
    reward = play(real, player, tasks(arguments={"numbered": numbered}, system="Guess.").train(3))
    assert player.heard[0] == "0 to 9?" and set(player.heard[1:]) <= {"higher", "lower"}
    guesses = len(player.heard)
    assert reward.value == pytest.approx(1 - 0.1 * (guesses - 1))
    assert reward.metrics == {"turns": guesses, "invalid": 0, "finished": 1, "exact": 1}


def test_what_is_no_action_costs_a_turn(real: Any) -> None:
    player = Player("I do not know", "4711", "-3")
    reward = play(real, player, tasks(turns=3).train(0))
    assert player.heard == ["0 to 9?", "That is no valid action.", "That is no valid action."]
    assert reward.value == 0 and reward.metrics == {"turns": 3, "invalid": 3, "finished": 0}


def test_its_own_limit_ends_it(real: Any) -> None:
    task = tasks(arguments={"highest": 900}).train(0)
    reward = play(real, Player("0", "0", "0", "0", "0", "0"), {**task, "seed": 2})
    assert reward.metrics == {"turns": 5, "invalid": 0, "finished": 1, "exact": 0}


def test_seeds_are_the_same_everywhere_and_held_out_ones_are_others() -> None:
    one, two = tasks(heldout=50), tasks(heldout=50)
    trained = [one.train(index)["seed"] for index in range(500)]
    assert trained == [two.train(index)["seed"] for index in range(500)] and len(set(trained)) > 490
    assert {row["seed"] for row in one.heldout()}.isdisjoint(trained) and len(one.heldout()) == 50


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"make": "Gues-v0"}, "make = 'Gues-v0', arguments = {}: "),
        ({"make": "no_such_module:Guess-v0"}, "No module named 'no_such_module'"),
        ({"arguments": {"lowest": 3}}, "unexpected keyword argument 'lowest'"),
        ({"make": "Box-v0"}, "it observes ndarray; only text can be said to the policy"),
        ({"arguments": {"shows": "number"}}, "it observes int"),
        ({"answer": "first"}, "answer = 'first': write one of text"),
        ({"turns": 0}, "turns = 0: write at least 1"),
        ({"heldout": -1}, "heldout = -1: write 0 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        tasks(**options)
    assert str(caught.value).startswith("environment.options of gymnasium: ") and says in str(caught.value)
