"""The environment API: a coroutine that talks to a policy and returns a reward.

    from async_rl import Policy, Task, environment

    @environment("countdown", tasks=CountdownTasks)
    async def countdown(task: Task, policy: Policy) -> float:
        reply = await policy.chat([{"role": "user", "content": task["prompt"]}])
        return 1.0 if solves(reply.text, task) else 0.0

Whatever the coroutine awaits, the recorder behind `policy` keeps tokens, log-probs and versions. An exception or a
time-out is a failed rollout with its traceback, never a dead generator and never a silent reward of zero.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeAlias

from async_rl import config
from async_rl.errors import UserError
from async_rl.tasks.source import TaskSource
from async_rl.wire.messages import FinishReason, Task

Message: TypeAlias = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may hold "tool_calls" and
"reasoning_content" besides, in OpenAI's form."""

Tool: TypeAlias = Mapping[str, Any]
"""{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema of the arguments}}"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the policy wrote it: nothing says that the tool exists, or takes these arguments."""

    id: str
    """Unique in the episode."""
    name: str
    arguments: Mapping[str, Any]

    @property
    def message(self) -> dict[str, Any]:
        """As it stands in `tool_calls` of a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}

    def result(self, content: str) -> dict[str, Any]:
        """The message that answers it."""
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": content}


class Reply(Protocol):
    """What the policy said."""

    @property
    def text(self) -> str:
        """All of it, decoded without special tokens."""
        ...

    @property
    def content(self) -> str:
        """Without thoughts, and without calls of tools."""
        ...

    @property
    def reasoning(self) -> str | None:
        """The thoughts, if the model's template knows them and there are any."""
        ...

    @property
    def tool_calls(self) -> Sequence[ToolCall]:
        """Empty, if `chat` got no tools."""
        ...

    @property
    def message(self) -> dict[str, Any]:
        """To be appended to the conversation."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Sampled token ids, the end-of-sequence token included."""
        ...

    @property
    def finish_reason(self) -> FinishReason: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI client finds the policy of this episode, and of no other."""

    base_url: str
    """http://HOST:PORT/v1"""
    api_key: str
    model: str


class Policy(Protocol):
    """The policy under training; the only seam an environment sees."""

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """The reply to a conversation under the model's chat template.

        Args:
            tools: what the policy may call; the calls it writes are in `reply.tool_calls`.
            stop: texts that end the reply.
        """
        ...

    async def complete(
        self, prompt: str | Sequence[int], *, max_new_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Reply:
        """The continuation of a text, or of token ids."""
        ...

    def endpoint(self, *, ignore: Sequence[str] = ()) -> AbstractAsyncContextManager[Endpoint]:
        """An OpenAI-compatible server, in whose place this policy answers, for an agent that is code of its own.

        Args:
            ignore: parameters that the agent cannot help sending, such as "temperature", and that are not heeded;
                without it a request that would sample from another distribution than the trained one is refused.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reward:
    """A scalar to train on, with its named parts, and numbers that are only logged (`exact`, 0 or 1, among them)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of(cls, returned: object) -> Reward:
        """From what an environment may return: a number, a dict of named parts (their sum is trained on), a Reward.

        Raises:
            TypeError, ValueError: it is something else, or not finite.
        """
        if isinstance(returned, Reward):
            reward = returned
        elif isinstance(returned, (int, float)):
            reward = cls(float(returned))
        elif isinstance(returned, Mapping):
            parts = {str(name): float(part) for name, part in returned.items()}  # pyright: ignore[reportArgumentType]
            reward = cls(sum(parts.values()), parts)
        else:
            raise TypeError(
                f"an environment returned {returned!r}: return a float, a dict of named floats, or a Reward"
            )
        if not math.isfinite(reward.value):
            raise ValueError(f"an environment returned the reward {reward.value}: return a finite number")
        return reward


Episode: TypeAlias = Callable[[Task, Policy], Awaitable[float | Mapping[str, float] | Reward]]


def _nothing() -> None:
    """An environment that needs nothing."""


@dataclass(frozen=True, slots=True)
class Environment:
    name: str
    episode: Episode
    tasks: Callable[..., TaskSource]
    """Called with `seed` and the recipe's `environment.options`."""
    needs: Callable[[], object] = _nothing
    """Called in every process that runs episodes, before the first. Raises UserError: something is missing there."""


_registered: dict[str, Environment] = {}


def environment(
    name: str, *, tasks: Callable[..., TaskSource], needs: Callable[[], object] = _nothing
) -> Callable[[Episode], Episode]:
    """Register the decorated coroutine function under `name`.

    Args:
        tasks: makes the task source; its keyword arguments are what `environment.options` may set.
        needs: raises UserError where episodes cannot run, such as `rewards.require_code`; called once, at the start of
            every process that runs them.
    """

    def register(episode: Episode) -> Episode:
        if not inspect.iscoroutinefunction(episode):
            raise TypeError(f"environment {name!r}: write `async def`, an episode awaits the policy")
        _registered[name] = Environment(name, episode, tasks, needs)
        return episode

    return register


def find(chosen: config.Environment) -> Environment:
    """The environment a recipe names, from its module or from the bundled ones.

    Raises:
        UserError: there is no such module or environment.
    """
    if chosen.module:
        _import(chosen.module)
    elif chosen.name in bundled():
        importlib.import_module(f"async_rl.environments.{chosen.name}")
    if chosen.name not in _registered:
        known = sorted({*_registered, *bundled()})
        close = difflib.get_close_matches(chosen.name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        where = f"{chosen.module} registers no such environment" if chosen.module else "there is no such environment"
        raise UserError(f"environment.name = {chosen.name!r}: {where}; {hint}")
    return _registered[chosen.name]


def make_tasks(found: Environment, options: Mapping[str, Any], seed: int) -> TaskSource:
    """The task source with the recipe's options. Raises UserError naming an option it does not have."""
    known = [name for name in inspect.signature(found.tasks).parameters if name != "seed"]
    for name, value in options.items():
        if name not in known:
            raise UserError(f"environment.options.{name} = {value!r}: {found.name} knows {', '.join(known) or 'none'}")
    try:
        return found.tasks(seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"environment.options of {found.name}: {error}") from error


def bundled() -> list[str]:
    """Names of the environments that come with this package; each is a module here."""
    package = importlib.import_module("async_rl.environments")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "api"]


def _import(module: str) -> ModuleType:
    try:
        if not module.endswith(".py"):
            return importlib.import_module(module)
        path = Path(module)
        if not path.is_file():
            raise UserError(f"environment.module = {module!r}: there is no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = loaded
        spec.loader.exec_module(loaded)
        return loaded
    except ImportError as error:
        raise UserError(f"environment.module = {module!r}: {error}") from error
