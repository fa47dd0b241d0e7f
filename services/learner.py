"""A learner process: rank 0 talks to the controller, the other ranks follow it."""

from __future__ import annotations

import asyncio

from async_rl.launch.child import Parent, ServeOptions

from async_rl import config
from async_rl.exit_codes import EXIT_AGAIN
from async_rl.learner.service import LearnerService
from async_rl.learner.trainer import Learner
from async_rl.models.precision import settle
from async_rl.run_secrets import ClientKeys
from async_rl.weights.publisher import make_publisher
from async_rl.wire.codec import training_stream
from async_rl.wire.messages import Shutdown
from async_rl.wire.zeromq import ZmqClient


def main(run: config.Run, options: ServeOptions, parent: Parent) -> int:
    keys = options.keys(run, "learner")
    run = settle(run)
    learner = Learner(run, options.run_dir)
    try:
        if learner.ranks.rank > 0:
            parent.ready()
            learner.follow()
            return 0
        return EXIT_AGAIN if asyncio.run(_serve(run, learner, options, keys, parent)).restart else 0
    finally:
        learner.close()


async def _serve(
    run: config.Run, learner: Learner, options: ServeOptions, keys: ClientKeys | None, parent: Parent
) -> Shutdown:
    transport = ZmqClient(training_stream().mirror, options.connect, keys)
    loop = asyncio.get_running_loop()

    def forward(message: object) -> None:  # from the publisher's thread
        loop.call_soon_threadsafe(transport.send, message)

    try:
        publisher = make_publisher(
            run, options.run_dir, learner.layout, forward, forward, pinned=learner.ranks.device.type == "cuda"
        )
        try:
            parent.ready()
            return await LearnerService(run, learner, publisher, transport).run()
        finally:
            publisher.close()
    finally:
        await transport.close()
