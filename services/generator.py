"""A generator process: an engine, the environment, and the worker that joins them to the controller."""

from __future__ import annotations

import asyncio

from async_rl.launch.child import Parent, ServeOptions

from async_rl import config
from async_rl.engines.make import make_engine
from async_rl.environments.api import find
from async_rl.exit_codes import EXIT_AGAIN
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.models.precision import settle
from async_rl.rewards.pool import configure
from async_rl.rollout.host_runner import on_thread
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.rollout.worker import RolloutWorker
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.weights.receiver import make_receiver
from async_rl.weights.wire_layout import wire_layout
from async_rl.wire.codec import rollout_stream
from async_rl.wire.messages import Shutdown
from async_rl.wire.zeromq import ZmqClient


def main(run: config.Run, options: ServeOptions, parent: Parent) -> int:
    return EXIT_AGAIN if asyncio.run(_serve(run, options, parent)).restart else 0


async def _serve(run: config.Run, options: ServeOptions, parent: Parent) -> Shutdown:
    keys = options.keys(run, "generator")
    run = settle(run)
    configure(run.rewards)
    environment = find(run.environment)
    environment.needs()
    model_config = load_config(run.model)
    logs = RunDirectory(options.run_dir).logs
    engine = make_engine(run, model_config, logs, name=options.name, index=_index(options.name))
    receiver = make_receiver(run, options.name, wire_layout(run, model_config))
    transport = ZmqClient(rollout_stream().mirror, options.connect, keys)
    try:
        worker = RolloutWorker(
            name=options.name,
            transport=transport,
            engine=engine,
            environment=environment,
            text=TokenizerText(load_tokenizer(run.model), load_stop_tokens(run.model)),
            receiver=receiver,
            credit=run.credit_rollouts,
            timeout_s=run.environment.timeout_s,
            run_host=on_thread,
            colocated=run.colocated,
            dtype=run.generator.dtype,
            endpoint_host=run.environment.endpoint_host,
        )
        parent.ready()
        return await worker.run()
    finally:
        receiver.close()
        await transport.close()


def _index(name: str) -> int:
    """Of `generator-3`: 3; 0 where the name has no number."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
