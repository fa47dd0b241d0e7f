"""Every snippet of docs/environments.md is run: what it registers plays an episode with a model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_rl.config import Environment, Model, TinyModel
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Snapshot
from async_rl.environments import api
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer
from async_rl.rollout.host import EpisodeHost
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.wire.messages import Failed, Finished, GroupLease, Sampling, Task, WeightsId

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "environments.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
TINY = Model(tiny=TinyModel(characters=PRINTABLE, hidden_size=32, layers=1, max_length=4096))


@pytest.fixture(scope="module")
def registered() -> dict[str, api.Environment]:
    """The snippets are one program, in the order of the page."""
    names = re.findall(r'^@environment\("(\w+)"', "".join(SNIPPETS), re.MULTILINE)
    exec(compile("\n".join(SNIPPETS), str(DOCUMENT), "exec"), {"__name__": "documentation"})
    return {name: api.find(Environment(name=name)) for name in names}


def test_every_snippet_plays(registered: dict[str, api.Environment], real: Callable[[Any], Any]) -> None:
    async def play(environment: api.Environment) -> Finished | Failed:
        ended: asyncio.Future[Finished | Failed] = asyncio.get_running_loop().create_future()
        started = asyncio.Event()
        engine = EmbeddedEngine(load_config(TINY), slots=8, dtype=torch.float32)
        host = EpisodeHost(
            environment,
            TokenizerText(load_tokenizer(TINY), load_stop_tokens(TINY)),
            engine,
            timeout_s=60,
            started=started.set,
            report=lambda messages: ended.set_result(messages[0]),
            clock=asyncio.get_running_loop().time,
        )
        engine.start(host.deliver_threadsafe)
        model: Any = build_model(TINY, seed=1)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(host.run())
            await started.wait()
            await engine.load_weights(Snapshot(WeightsId(0, 0), dict(model.named_parameters())))
            task = Task("t", dict(environment.tasks(seed=0).train(0)))
            host.start([GroupLease(7, "train", task, [0], Sampling(32, seed=3))])
            outcome = await ended
            host.close()
        await engine.stop()
        return outcome

    async def main() -> None:
        assert len(registered) >= 3
        for name, environment in registered.items():
            outcome = await play(environment)
            assert isinstance(outcome, Finished), f"{name}: {outcome}"

    real(main())
