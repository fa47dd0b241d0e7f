"""The controller process: ledger, streams, admin endpoint. No torch."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from async_rl.launch.child import Parent, ServeOptions

from async_rl import config
from async_rl.controller import admin
from async_rl.controller.admin_access import Access
from async_rl.controller.controller import Controller
from async_rl.environments.api import find, make_tasks
from async_rl.exit_codes import EXIT_STOPPED
from async_rl.ledger.integrity import naming
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import DATA, LmdbStore
from async_rl.listening import is_loopback
from async_rl.telemetry.exporters import exporters
from async_rl.telemetry.feed import Feed
from async_rl.telemetry.files import write_json
from async_rl.telemetry.run_directory import DirectoryJournal, RunDirectory
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.zeromq import ZmqServer


def main(run: config.Run, options: ServeOptions, parent: Parent) -> int:
    directory = RunDirectory(options.run_dir)
    with directory.hold():
        return 0 if asyncio.run(_serve(run, directory, options, parent)) else EXIT_STOPPED


async def _serve(run: config.Run, directory: RunDirectory, options: ServeOptions, parent: Parent) -> bool:
    """Returns whether the run is complete."""
    environment = find(run.environment)
    tasks = make_tasks(environment, run.environment.options, run.seed)
    host, port = run.controller.host, run.controller.port
    keys = options.secrets.make() if run.secured else None
    async with AsyncExitStack() as opened:  # whatever fails: a socket that is left open keeps the process alive
        rollouts = ZmqServer(rollout_stream(), host, port, role="generator", keys=keys)
        opened.push_async_callback(rollouts.close)
        training = ZmqServer(training_stream(), host, port + 1 if port else 0, role="learner", keys=keys)
        opened.push_async_callback(training.close)
        with naming(directory.ledger / DATA):
            ledger = await Ledger.open(LmdbStore(directory.ledger))
        opened.push_async_callback(ledger.close)
        feed = Feed()

        def tell(kind: str, data: Any) -> None:
            feed.tell(kind, data)
            parent.tell(kind, data)

        journal = DirectoryJournal(directory, tell, exporters(run, directory.path))
        opened.callback(journal.close)
        if run.security.insecure and not is_loopback(host):
            journal.say(f"INSECURE, as the recipe says: who reaches {host} can steer this run and put anything into it")
        controller = Controller(run, ledger=ledger, tasks=tasks, rollouts=rollouts, training=training, journal=journal)
        token_file = options.secrets.token_file if run.secured else None
        access = Access(host, options.secrets.token() if run.secured else "", token_file)
        port, name = run.controller.admin_port, directory.path.name
        runner, url = await admin.start(controller, host, port, access, feed=feed, name=name)
        opened.callback(directory.admin.unlink, missing_ok=True)
        opened.push_async_callback(runner.cleanup)
        write_json(directory.admin, {"url": url, "token_file": token_file and str(token_file)}, mode=0o600)
        loop = asyncio.get_running_loop()
        parent.on_stop(lambda within_s: loop.call_soon_threadsafe(controller.stop, within_s))
        parent.ready({"rollouts": rollouts.address, "training": training.address, "admin": url})
        complete = await controller.run()
        parent.tell("end", {"complete": complete, "step": controller.version})
        return complete
