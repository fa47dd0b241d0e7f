"""Do engine and learner agree on log-probs? A train step at learning rate 0, over any engine.

    observations = observe(run, of_recipe(run, logs))
    diagnose(observations)                       # doctor.diagnosis

The engine first gets slightly other weights and a few tokens to sample, so that whatever it keeps of them shows; then
the weights of the recipe, and rollouts of some tasks. The learner recomputes the log-probs of what was sampled, packed
as it trains. Only where they differ are hypotheses tried; some of them sample again with another engine.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import ChainMap
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from async_rl.config import Run
from async_rl.doctor.diagnosis import Gap, Observations, agrees, drawn
from async_rl.doctor.recomputation import Recomputation
from async_rl.engines.make import make_engine
from async_rl.engines.protocol import Engine, Snapshot
from async_rl.environments.api import find, make_tasks
from async_rl.errors import AsyncRLError, UserError
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.stages import local_engine
from async_rl.stages.episodes import Group, episodes
from async_rl.tasks.source import heldout_tasks, train_task
from async_rl.telemetry.agreement import limits
from async_rl.wire.messages import GroupLease, Sampling, Task, WeightsId
from async_rl.wire.messages import Sequence as WireSequence

GROUP, MIN_TASKS, MAX_TASKS = 4, 4, 64
TOKENS = 2048
"""Sampled tokens to aim at."""
MAX_NEW_TOKENS = 128
WARM_UP_TOKENS = 2
NAME = "doctor"
OLDER_NAME, OLDER_FACTOR = "model.layers.0.input_layernorm.weight", 2.0
"""How the engine's first weights differ: every key and value depends on it."""
OLDER, NEWER = WeightsId(0, 0), WeightsId(0, 1)

MakeEngine = Callable[[str | None], Engine]
"""A new engine, not started: in this dtype, or, with None, just as the recipe has it."""


class NothingSampled(AsyncRLError):
    """Every episode failed: why the first one did."""


def of_recipe(run: Run, logs: Path) -> MakeEngine:
    """The engine of a generator of this recipe. A server is started for each, and prints into this directory."""
    config = load_config(run.model)
    if run.generator.engine == "embedded":
        return lambda dtype: local_engine.make_engine(run, config, slots=MAX_TASKS * GROUP, dtype=dtype)

    def make(dtype: str | None) -> Engine:
        generator = msgspec.structs.replace(run.generator, dtype=dtype or run.generator.dtype, count=1)
        return make_engine(msgspec.structs.replace(run, generator=generator), config, logs, name=NAME)

    return make


@contextmanager
def server_files(run: Run, directory: Path) -> Generator[Path]:
    """For `of_recipe`: a server's log, which stays in this directory, and what it reads, which goes.

    Raises:
        UserError: the directory cannot be written.
    """
    if run.generator.engine == "sglang":
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{NAME}-sglang.log").write_bytes(b"")
        except OSError as error:
            raise UserError(
                f"--run-dir {directory}: cannot be written ({error.strerror}), a server's log goes there; choose "
                "another"
            ) from None
    try:
        yield directory.absolute()
    finally:
        shutil.rmtree(directory / f"{NAME}-sglang", ignore_errors=True)


def observe(run: Run, make: MakeEngine, *, others: bool = True) -> Observations:
    """Sample, recompute, compare.

    others: `make` can be called for other engines than the recipe's; not where its servers are there already.

    Raises:
        NothingSampled: every episode failed.
        UserError: the recipe is wrong.
    """
    recompute = Recomputation(run)
    parameters = dict(recompute.model.named_parameters())
    newer = Snapshot(NEWER, parameters)
    other = {OLDER_NAME: parameters[OLDER_NAME].detach() * OLDER_FACTOR}
    older = Snapshot(OLDER, ChainMap(other, parameters))
    tokenizer = load_tokenizer(run.model)
    text = TokenizerText(tokenizer, load_stop_tokens(run.model))

    def sample(dtype: str | None, *snapshots: Snapshot) -> list[Group]:
        return asyncio.run(_sample(run, make(dtype), text, snapshots))

    engine, learner, temperature = run.generator.dtype, run.learner.dtype, run.rollout.temperature

    def gap(groups: list[Group], dtype: str) -> Gap:
        recomputed = recompute(groups, dtype)
        return recomputed.gap(recomputed.logprobs(temperature))

    groups = sample(None, older, newer)
    recomputed = recompute(groups, learner)
    logp_K = recomputed.logprobs(temperature)
    observations = Observations(
        engine_dtype=engine,
        learner_dtype=learner,
        temperature=temperature,
        gap=recomputed.gap(logp_K),
        first=recomputed.gap(logp_K, recomputed.first_K),
        later=recomputed.gap(logp_K, ~recomputed.first_K),
        draws=recomputed.draws(temperature),
        prompts_survive=all(_survives(tokenizer, sequence) for sequence in _sequences(groups)),
    )
    if agrees(observations.gap, engine, learner):
        if drawn(observations.draws):
            return observations
        return msgspec.structs.replace(observations, best_draws=recomputed.draws(recomputed.likeliest_temperature()))
    best = recomputed.closest_temperature()
    with recompute.scaled(OLDER_NAME, OLDER_FACTOR):
        older_weights = gap(groups, learner)
    tried = msgspec.structs.replace(
        observations,
        best_temperature=best,
        at_best_temperature=recomputed.gap(recomputed.logprobs(best)),
        older_weights=older_weights,
        renormalised=recomputed.renormalised(logp_K, temperature, limits(engine, learner).mean),
        float32_learner=gap(groups, "float32"),
    )
    if not others:
        return tried
    return msgspec.structs.replace(
        tried,
        fresh_engine=gap(sample(None, newer), learner),
        float32_engine=gap(sample("float32", newer), learner),
    )


async def _sample(run: Run, engine: Engine, text: TokenizerText, snapshots: Sequence[Snapshot]) -> list[Group]:
    """What the policy samples under the last snapshot, after a few tokens under each of the others."""
    environment = find(run.environment)
    room = engine.capabilities.max_concurrent
    async with episodes(engine, environment, text, at_once=room, timeout_s=run.environment.timeout_s) as running:
        for snapshot in snapshots[:-1]:
            await engine.load_weights(snapshot)
            await running.run(_leases(run, WARM_UP_TOKENS))
        await engine.load_weights(snapshots[-1])
        groups = await running.run(_leases(run, min(run.rollout.max_new_tokens, MAX_NEW_TOKENS)))
    if not _sequences(groups):
        failed = groups[0].failures[0]
        raise NothingSampled(failed.traceback.strip() or failed.reason)
    return groups


def _sequences(groups: list[Group]) -> list[WireSequence]:
    return [sequence for group in groups for result in group.results for sequence in result.sequences]


def _leases(run: Run, max_new_tokens: int) -> list[GroupLease]:
    """The same tasks every time."""
    source = make_tasks(find(run.environment), run.environment.options, run.seed)
    members = min(GROUP, run.rollout.group_size)
    count = min(MAX_TASKS, max(MIN_TASKS, TOKENS // (members * min(run.rollout.max_new_tokens, MAX_NEW_TOKENS))))
    tasks: list[Task] = heldout_tasks(source, count) or [train_task(source, index) for index in range(count)]
    sampling = Sampling(max_new_tokens, run.rollout.temperature, run.seed)
    return [GroupLease(index, "eval", task, list(range(members)), sampling) for index, task in enumerate(tasks)]


def _survives(tokenizer: PreTrainedTokenizerBase, sequence: WireSequence) -> bool:
    """Whether the prompt comes back from text as the same tokens."""
    prompt: list[int] = np.frombuffer(sequence.tokens, "<i4")[: sequence.spans[0].start].tolist()
    return tokenizer.encode(str(tokenizer.decode(prompt)), add_special_tokens=False) == prompt
