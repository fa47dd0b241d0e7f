"""The examples of docs/rewards.md do what the page says."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from judges import endpoint

from async_rl import config, recipes, rewards
from async_rl.environments.api import Reward, find, make_tasks
from async_rl.tasks.source import train_task
from async_rl.wire.messages import Task

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Says:
    """A policy that gives one reply."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.finish_reason = text, (1, 2, 3), "eos"
        self.content = text

    async def chat(self, messages: Any, *, max_new_tokens: int | None = None) -> Says:
        return self


def names(example: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(example, found)
    return found


def test_the_episode_in_one_line() -> None:
    episode = names(EXAMPLES[0])["episode"]
    task = Task("t", {"prompt": "Half of 1?", "answer": "1/2"})
    right = asyncio.run(episode(task, Says(r"It is \boxed{0.5}.")))
    assert right.value == pytest.approx(2.1) and right.metrics == {"exact": 1.0}
    assert asyncio.run(episode(task, Says("Это 0.7."))).value == 0.0


def test_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(workers=1, unsafe_code=True))
    found = names(EXAMPLES[1])
    rows = [found["tasks"](1).train(i) for i in range(2)]
    functions, script = sorted(rows, key=lambda row: row["prompt"], reverse=True)
    right = {
        functions["prompt"]: "```python\ndef add(a, b):\n    return a + b\n```",
        script["prompt"]: "```\nprint(sum(map(int, input().split())))\n```",
    }

    async def both() -> list[float]:
        return [await found["programs"](Task("t", row), Says(right[row["prompt"]])) for row in (functions, script)]

    assert asyncio.run(both()) == [1.0, 1.0]


def test_the_judge() -> None:
    async def judged() -> Reward:
        async with endpoint(lambda asked: '{"score": 8}' if "Blue light" in asked else "") as (url, _):
            episode = names(EXAMPLES[2].replace("http://127.0.0.1:8000/v1", url))["explained"]
            task = Task("t", {"prompt": "Why is the sky blue?", "answer": "Rayleigh"})
            return await episode(task, Says("Blue light is scattered most."))

    assert asyncio.run(judged()).parts == {"judge": 0.8, "language": 1.0}


def test_the_recipe_without_python(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    rows = [{"prompt": f"Half of {n}?", "answer": f"{n}/2"} for n in range(9)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text('steps = 1\n[model.tiny]\ncharacters = "0"\n' + recipe)
    chosen = recipes.load(tmp_path / "recipe.toml").environment
    found = find(chosen)
    task = train_task(make_tasks(found, chosen.options, 1), 0)
    (right,) = task["answer"]
    assert task["messages"][0]["content"].endswith("\nThink first, then put the answer in \\boxed{}.")
    assert asyncio.run(found.episode(task, Says(rf"Well, \boxed{{{right}}}"))).value == 1.0
    assert asyncio.run(found.episode(task, Says(f"Well, {right}"))).value == 0.0


def test_every_reward_is_described() -> None:
    for name in set(rewards.__all__) - {"Grade", "configure"}:
        assert re.search(rf"\b{name}\b", PAGE), name


def test_the_settings_are_those_of_the_recipe() -> None:
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", PAGE.partition("## In the recipe")[2], re.MULTILINE)
    said = {name: default.strip() for name, default in rows}
    defaults = msgspec.to_builtins(config.Rewards())
    assert said == {name: str(value).removesuffix(".0").lower() for name, value in defaults.items()}
