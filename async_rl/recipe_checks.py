"""Bounds of a recipe that types do not express; a UserError names the field, the value and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter
from urllib.parse import urlsplit

from async_rl.config import Optimizer, Run, SGLang
from async_rl.errors import UserError

POSITIVE = (
    "steps",
    "rollout.groups_per_step",
    "rollout.group_size",
    "rollout.max_new_tokens",
    "generator.count",
    "generator.slots",
    "learner.microbatch_tokens",
    "learner.ranks",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "environment.timeout_s",
    "weights.timeout_s",
    "weights.full_every",
    "controller.heartbeat_timeout_s",
    "controller.watchdog_s",
    "rollout.attempts",
    "critic.epochs",
    "rollout.temperature",
    "simulate.generators",
    "simulate.learners",
    "simulate.learner_tokens_s",
    "simulate.prefill_tokens_s",
    "environment.failures_in_a_row",
    "simulate.step_s",
    "simulate.mean_tokens",
    "simulate.block_tokens",
    "simulate.measured_steps",
    "simulate.seeds",
    "rewards.workers",
    "rewards.deadline_s",
    "rewards.memory_mb",
    "rewards.program_memory_mb",
    "rewards.program_processes",
)
"""What has to be above 0, where it is set."""
NOT_NEGATIVE = (
    "seed",
    "staleness.max_staleness",
    "staleness.depth",
    "rollout.segment_tokens",
    "rollout.lease_tokens",
    "critic.clip",
    "critic.coef",
    "reference.refresh_steps",
    "learner.mismatch_steps",
    "evaluation.tasks",
    "evaluation.every_steps",
    "checkpoint.keep_best",
    "generator.max_length",
    "generator.queued_rollouts",
    "simulate.sequence_s",
    "simulate.pause_s",
    "simulate.sigma",
    "simulate.warmup_steps",
    *(
        f"{section}.{field}"
        for section in ("optimizer", "critic.optimizer")
        for field in ("learning_rate", "clip_norm", "warmup_steps", "decay_steps", "final_rate")
    ),
)
"""What has to be 0 or more, where it is set."""
WILDCARDS = ("0.0.0.0", "::")
"""One can listen there, and reach nobody."""
SERVER_IS_TOLD = {
    "--port": "leave it out, any free one will do, or start the server yourself and write generator.sglang.attach",
    "--host": "leave it out, only its generator talks to it, or start the server yourself and write "
    "generator.sglang.attach",
    "--model-path": "write model.path",
    "--model": "write model.path",
}
"""Arguments of a SGLang server with which its generator would wait for it in vain, or for another model."""


def check(run: Run) -> None:
    """Raises UserError."""
    check_signs(run, positive=POSITIVE, not_negative=NOT_NEGATIVE)
    _addresses(run)
    _model(run)
    _learner(run)
    _rollouts(run)
    _curriculum(run)
    _checkpoints(run)
    _simulated(run)
    _sglang(run)
    if run.colocated:
        _colocated(run)


def demand(holds: bool, field: str, value: object, instead: str) -> None:
    if not holds:
        raise UserError(f"{field} = {value!r}: {instead}")


def check_signs(recipe: object, *, positive: Iterable[str], not_negative: Iterable[str]) -> None:
    """Fields by their dotted names; one that is None is left out. Raises UserError."""
    for field in positive:
        value = attrgetter(field)(recipe)
        demand(value is None or 0 < value < math.inf, field, value, "write a number above 0")
    for field in not_negative:
        value = attrgetter(field)(recipe)
        demand(value is None or 0 <= value < math.inf, field, value, "write 0 or more")


def _addresses(run: Run) -> None:
    for field, value in [
        ("controller.port", run.controller.port),
        ("controller.admin_port", run.controller.admin_port),
        ("weights.relay_port", run.weights.relay_port),
        ("rewards.port", run.rewards.port),
    ]:
        demand(0 <= value <= 65534, field, value, "write a port from 1 to 65534, or 0 for any free one")
    service = run.rewards.service
    demand(
        not service or service.startswith(("http://", "https://")), "rewards.service", service, "write http://host:port"
    )
    relay = run.weights.relay_url
    demand(not relay or _is_url(relay, "http"), "weights.relay_url", relay, "write http://host:port")
    elsewhere = run.weights.transport == "http" and relay != ""
    everywhere = run.weights.host in WILDCARDS and not elsewhere
    demand(not everywhere, "weights.host", run.weights.host, "write the address at which generators reach the learner")
    demand(
        run.environment.endpoint_host not in ("", "0.0.0.0", "::"),
        "environment.endpoint_host",
        run.environment.endpoint_host,
        "write the one address at which agents reach the generator's machine; it is part of the URL they get",
    )
    demand(bool(run.controller.host), "controller.host", "", "write an address of the controller's machine")
    everywhere = run.controller.host in WILDCARDS
    demand(not everywhere, "controller.host", run.controller.host, "write the one address at which others reach it")
    both = run.security.loopback and run.security.insecure
    demand(not both, "security.insecure", True, "security.loopback = true asks for keys everywhere: write one of them")


def _is_url(text: str, *schemes: str) -> bool:
    """Of a host, with or without a port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _model(run: Run) -> None:
    one_model = (run.model.path != "") != (run.model.tiny is not None)
    demand(one_model, "model", "path and tiny" if run.model.path else "nothing", "set exactly one of path and tiny")
    scored = bool(run.reward_model.path)
    demand(
        scored or run.critic.init == "policy", "critic.init", run.critic.init, "set reward_model.path, or write policy"
    )
    demand(
        not scored or run.rollout.filter == "none",
        "rollout.filter",
        run.rollout.filter,
        "groups are filtered before a reward model scores them: write none",
    )
    for field, value in [("critic.gamma", run.critic.gamma), ("critic.lam", run.critic.lam)]:
        demand(0 <= value <= 1, field, value, "write a number from 0 to 1")


def _learner(run: Run) -> None:
    demand(
        run.rollout.max_new_tokens < run.learner.microbatch_tokens,
        "learner.microbatch_tokens",
        run.learner.microbatch_tokens,
        f"a rollout is trained whole: write more than rollout.max_new_tokens = {run.rollout.max_new_tokens} and the "
        "longest prompt",
    )
    if run.learner.lora is not None:
        lora, refresh = run.learner.lora, run.reference.refresh_steps
        demand(lora.rank > 0, "learner.lora.rank", lora.rank, "write a number above 0")
        demand(lora.alpha > 0, "learner.lora.alpha", lora.alpha, "write a number above 0")
        demand(not refresh, "reference.refresh_steps", refresh, "a reference beside learner.lora stays: write 0")
    check_optimizer("optimizer", run.optimizer)
    check_optimizer("critic.optimizer", run.critic.optimizer)


def check_optimizer(section: str, optimizer: Optimizer) -> None:
    """Raises UserError."""
    demand(
        optimizer.schedule == "constant" or not optimizer.decay_steps,
        f"{section}.decay_steps",
        optimizer.decay_steps,
        f"a {optimizer.schedule} schedule decays all the time: write 0, or {section}.schedule = 'constant'",
    )


def _rollouts(run: Run) -> None:
    if run.rollout.filter == "uniform":
        demand(run.rollout.group_size > 1, "rollout.filter", "uniform", "a group of one is always uniform: write none")
    budget = run.staleness.mask_budget
    demand(0 <= budget < 1, "staleness.mask_budget", budget, "write a share of the tokens, from 0 to below 1")


def _curriculum(run: Run) -> None:
    chosen = run.curriculum
    for field in ("floor", "start"):
        value = getattr(chosen, field)
        demand(0 <= value <= 1, f"curriculum.{field}", value, "write a number from 0 to 1")
    demand(0 < chosen.smoothing <= 1, "curriculum.smoothing", chosen.smoothing, "write a share above 0, up to 1")
    if chosen.difficulty:
        demand(
            chosen.steps > 0, "curriculum.steps", chosen.steps, "with a difficulty, write over how many steps it rises"
        )
        demand(chosen.sampling == "prioritized", "curriculum.sampling", chosen.sampling, "write prioritized")
    else:
        demand(chosen.steps == 0, "curriculum.steps", chosen.steps, "without curriculum.difficulty, write 0")


def _checkpoints(run: Run) -> None:
    if run.checkpoint.keep_best:
        every, evaluated = run.checkpoint.every_steps, run.evaluation.every_steps
        demand(run.evaluation.tasks > 0, "evaluation.tasks", 0, "checkpoint.keep_best needs them: write 1 or more")
        demand(
            evaluated > 0 and every % evaluated == 0,
            "evaluation.every_steps",
            evaluated,
            f"checkpoint.keep_best needs an evaluation of every checkpoint: write {every} or a divisor of it",
        )


def _simulated(run: Run) -> None:
    made_up = run.simulate
    demand(made_up.cap >= 1, "simulate.cap", made_up.cap, "write the longest rollout in means, 1 or more")
    demand(0 <= made_up.between <= 1, "simulate.between", made_up.between, "write a share of the variance, from 0 to 1")
    demand(
        made_up.concurrent >= made_up.generators,
        "simulate.concurrent",
        made_up.concurrent,
        f"write at least one slot for each of the {made_up.generators} generators",
    )


def _sglang(run: Run) -> None:
    server, engine, count = run.generator.sglang, run.generator.engine, run.generator.count
    if engine == "embedded":
        in_flight = run.weights.in_flight
        demand(in_flight in ("auto", "keep"), "weights.in_flight", in_flight, "write keep, or engine = sglang")
        demand(server == SGLang(), "generator.sglang", "...", "write generator.engine = 'sglang', or leave it out")
        return
    urls = [("generator.sglang.attach", url) for url in server.attach]
    urls += [("generator.sglang.router", server.router)] if server.router else []
    for field, url in urls:
        demand(_is_url(url, "http", "https"), field, url, "write a URL, such as http://10.0.0.5:30000")
    host = server.host
    demand(host not in ("", *WILDCARDS), "generator.sglang.host", host, "write the address at which servers reach it")
    for argument in server.arguments:
        instead = SERVER_IS_TOLD.get(argument.partition("=")[0], "")
        demand(not instead, "generator.sglang.arguments", argument, f"a generator tells its server: {instead}")
        apart = argument.split()
        joined = argument.startswith("--") and len(apart) > 1 and "=" not in apart[0]
        demand(not joined, "generator.sglang.arguments", argument, f"write {', '.join(map(repr, apart))}")
    if server.attach:
        enough = len({url.rstrip("/") for url in server.attach}) == len(server.attach) >= count
        demand(enough, "generator.sglang.attach", server.attach, f"write different URLs, at least {count}")
    if server.router:
        one = bool(server.attach) and count == 1
        demand(one, "generator.sglang.router", server.router, "write generator.count = 1, and its servers in attach")
    demand(server.stream_tokens > 0, "generator.sglang.stream_tokens", server.stream_tokens, "write a number above 0")
    for field in ("pause_s", "start_s", "stuck_s"):
        value = getattr(server, field)
        demand(0 < value < math.inf, f"generator.sglang.{field}", value, "write seconds, above 0")


def _colocated(run: Run) -> None:
    """One device, one process at a time on it."""
    reason = "with placement = 'colocated' one generator and one learner rank share a device: write"
    for field, value, allowed in [
        ("weights.transport", run.weights.transport.replace("auto", "shared_memory"), "shared_memory"),
        ("generator.sglang.backend", run.generator.sglang.backend, "gloo"),
        ("generator.count", run.generator.count, 1),
        ("learner.ranks", run.learner.ranks, 1),
        ("learner.sharding", run.learner.sharding, "none"),
        ("generator.device", run.generator.device, run.learner.device),
    ]:
        instead = f"{reason} {allowed}" + (", as learner.device" if field == "generator.device" else "")
        demand(value == allowed, field, value, f"{instead}, or placement = 'separate'")
