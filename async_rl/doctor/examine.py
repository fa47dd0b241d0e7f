"""`async-rl doctor [RECIPE]`: checks of this machine, and with a recipe whether it fits and computes the same twice.

for check in examine(run, Path("runs/sort")):
    print(line(check))
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import msgspec

from async_rl.config import Rewards, Run
from async_rl.doctor import machine
from async_rl.doctor.check import Check
from async_rl.doctor.diagnosis import Observations, diagnose
from async_rl.doctor.servers import servers
from async_rl.environments.api import find, make_tasks
from async_rl.errors import AsyncRLError
from async_rl.layout import visible_gpus
from async_rl.rewards.pool import configure
from async_rl.telemetry.exporters import check_exporters

HEAVY = ("torch", "transformers")
SHOWN_CHARACTERS = 100
ATTACHED = (
    "engine and learner were not compared: that loads weights into the servers of generator.sglang.attach, which may "
    "be at work. Say --attached if they may get them, or --set generator.sglang.attach=[] to start a server for it"
)
ATTACH_S = 30.0
"""Servers that are said to run answer so soon."""


def examine(run: Run | None, run_directory: Path, *, attached: bool = False) -> Generator[Check]:
    """One by one, as they are made; the last one takes as long as sampling a few rollouts.

    attached: servers of `generator.sglang.attach` may be given other weights, which they keep.
    """
    software = machine.software()
    yield from software
    yield machine.cores(run)
    yield machine.descriptors()
    yield from machine.ports(run)
    yield machine.syncing(run_directory)
    yield machine.programs(run.rewards if run is not None else Rewards())
    broken = [check.name for check in software if check.status == "FAIL" and check.name in HEAVY]
    if broken:
        return
    yield from machine.gpus()
    if run is None:
        yield machine.shared_memory(0)
        yield machine.disk(run_directory, 0, 0)
        yield machine.memory(0, machine.available_memory())
        return
    try:
        from async_rl.models.precision import settle

        run = settle(run)
        yield from _fits(run, run_directory)
        yield _environment(run)
        yield from servers(run)
        yield from _numerics(run, run_directory, attached)
    except AsyncRLError as error:
        yield Check("recipe", "FAIL", str(error))


def _fits(run: Run, run_directory: Path) -> Generator[Check]:
    import torch

    from async_rl.doctor.footprint import footprint
    from async_rl.learner import distributed
    from async_rl.stages import local_engine

    estimate = footprint(run)
    learner = distributed.choose_device(run.learner.device)
    taken = estimate.by_device(run, local_engine.choose_device(run.generator.device), learner)
    yield machine.shared_memory(estimate.shared_memory)
    yield machine.disk(run_directory, estimate.checkpoints(run), estimate.ledger)
    data = {"footprint": msgspec.to_builtins(estimate), "taken": taken}
    cpu = machine.memory(taken["cpu"], machine.available_memory())
    yield msgspec.structs.replace(cpu, data=data)
    gpus = visible_gpus()
    yield machine.places(run, gpus)
    if "cuda" in taken:
        most = taken["cuda"] if len(gpus) == 1 else max(estimate.learner, estimate.generator)
        yield machine.memory(most, torch.cuda.mem_get_info(learner.index or 0)[0], "cuda")


def _environment(run: Run) -> Check:
    check_exporters(run)
    environment = find(run.environment)
    configure(run.rewards)
    environment.needs()
    tasks = make_tasks(environment, run.environment.options, run.seed)
    heldout = len(tasks.heldout())
    first = str(dict(tasks.train(0)))
    first = first if len(first) <= SHOWN_CHARACTERS else f"{first[:SHOWN_CHARACTERS]}..."
    status = "ok" if heldout or not run.evaluation.tasks else "warn"
    return Check("environment", status, f"{environment.name}: {heldout} held-out tasks, the first of training: {first}")


def _numerics(run: Run, run_directory: Path, attached: bool) -> Generator[Check]:
    from async_rl.doctor.numerics import NothingSampled, observe, of_recipe, server_files
    from async_rl.models.loading import load_stop_tokens, load_tokenizer

    tokenizer, stop = load_tokenizer(run.model), load_stop_tokens(run.model)
    if run.generator.sglang.attach and not attached:
        yield Check("numerics", "warn", ATTACHED)
        return
    try:
        with server_files(run, run_directory) as logs:
            observations = observe(run, of_recipe(_soon(run), logs), others=not run.generator.sglang.attach)
    except NothingSampled as error:
        yield Check(
            "episodes", "FAIL", f"every one of them failed: {str(error).splitlines()[-1]}", {"traceback": str(error)}
        )
        return
    problems: list[str] = []
    if tokenizer.chat_template is None:
        problems.append("there is no chat template: policy.chat fails, policy.complete works")
    if not stop:
        problems.append("there is no stop token: every reply ends at rollout.max_new_tokens")
    if not observations.prompts_survive:
        problems.append("prompts change when they are decoded and encoded again")
    found = "; ".join(problems) or f"{len(tokenizer)} tokens, {len(stop)} of them end a reply; prompts survive decoding"
    yield Check("tokenizer", "warn" if problems else "ok", found)
    yield numerics_check(observations)


def _soon(run: Run) -> Run:
    """Servers that run already are waited for a moment only."""
    server = run.generator.sglang
    if not server.attach:
        return run
    server = msgspec.structs.replace(server, start_s=min(server.start_s, ATTACH_S))
    return msgspec.structs.replace(run, generator=msgspec.structs.replace(run.generator, sglang=server))


def numerics_check(observations: Observations) -> Check:
    """What a person reads of them."""
    o, diagnosis = observations, diagnose(observations)
    found = (
        f"log-probs of engine ({o.engine_dtype}) and learner ({o.learner_dtype}) differ by {o.gap.mean:.1e} nats on "
        f"average, {o.gap.max:.1e} at most, k3 {o.gap.k3:.1e}; {o.gap.outside:.1%} of {o.gap.tokens} tokens have a "
        "ratio outside 0.8 to 1.25"
    )
    data = {"cause": diagnosis.cause, "observations": msgspec.to_builtins(observations)}
    if diagnosis.cause == "none":
        return Check("numerics", "ok", found, data)
    rounding = diagnosis.cause == "dtype" and "bfloat16" in (o.engine_dtype, o.learner_dtype)
    status = "warn" if rounding else "FAIL"  # more than usual, but what the recipe asks for
    return Check("numerics", status, f"{diagnosis.cause}: {diagnosis.explanation}; {found}", data)
