"""One node of a run on several machines: `launch/torchrun_cluster.sh` starts this on each of them.

Node 0 is the head: controller, the learner's first ranks, the view of the run (launch.head). The others do what it says
(launch.node). With --join a node brings more generators to a run that is at work, and may leave it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
from functools import partial
from pathlib import Path

from async_rl.launch.head import Head
from async_rl.launch.interface import sockets_of
from async_rl.launch.link import ADDRESS, JOINS, Arrive, Over, key_of
from async_rl.launch.node import Worker
from async_rl.launch.process import Here
from async_rl.launch.supervisor import Outcome, Supervisor, Watch

from async_rl import cli, recipes
from async_rl.config import Run
from async_rl.errors import AsyncRLError, UserError
from async_rl.exit_codes import EXIT_AGAIN, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT
from async_rl.layout import visible_gpus
from async_rl.listening import LOOPBACK
from async_rl.telemetry.run_directory import RunDirectory

DEFAULT_PORT = 29400
PATIENCE_S = 300.0
EXIT_CODES: dict[Outcome, int] = {"complete": 0, "again": EXIT_AGAIN, "stopped": EXIT_STOPPED}


def main() -> None:
    options = _parser().parse_args()
    cli.exit_with(lambda: _join(options) if options.join else _node(options))


def _node(options: argparse.Namespace) -> int:
    if options.recipe is None:
        raise UserError("RECIPE: write a recipe, or --join and a run directory")
    host, _, port = options.head.rpartition(":") if ":" in options.head else (options.head, "", "")
    if not host or not (port or "0").isdecimal():
        raise UserError(f"--head {options.head!r}: write HOST:PORT, an address of node 0 that all nodes reach")
    if not 0 <= options.node_rank < options.nodes:
        raise UserError(f"--node-rank {options.node_rank}: write a rank from 0 to {options.nodes - 1}, or more --nodes")
    address, number = _resolve(host), int(port or DEFAULT_PORT)
    run_dir = Path(options.run_dir or f"runs/{Path(options.recipe).stem}")
    if options.node_rank:
        arrive = _arrive(options, options.node_rank)
        return _work(RunDirectory(run_dir), arrive, f"{address}:{number}", options.patience)
    overrides = list(options.set)
    if address not in LOOPBACK and recipes.load(Path(options.recipe), overrides).controller.host in LOOPBACK:
        overrides.append(f"controller.host={address}")
    launch = partial(_head, options=options, address=address, port=number)
    return cli.train_recipe(
        Path(options.recipe), overrides, run_dir, launch, plain=True, with_report=not options.no_report
    )


def _head(
    run: Run, directory: RunDirectory, watch: Watch, *, options: argparse.Namespace, address: str, port: int
) -> Outcome:
    async def serve() -> Outcome:
        here = Here(directory, sockets_of(address))
        head = Head(
            run,
            directory,
            watch,
            here,
            address=address,
            port=port,
            key=key_of(directory),
            nodes=options.nodes,
            gpus=visible_gpus(),
            learner_machines=options.learner_nodes,
            start=options.start_id,
            patience_s=options.patience,
        )
        head.supervisor = Supervisor(run, directory, watch, head, here)
        async with head:
            try:
                outcome = await head.supervisor.run()
            except AsyncRLError as error:
                code = EXIT_WRONG_INPUT if isinstance(error, UserError) else EXIT_FAILED
                await head.over(Over(code, "the run has failed: node 0 says why"))
                raise
            await head.over(Over(EXIT_CODES[outcome]))
        return outcome

    return asyncio.run(serve())


def _join(options: argparse.Namespace) -> int:
    directory = RunDirectory(Path(options.join))
    return _work(directory, _arrive(options, JOINS), "", options.patience)


def _work(directory: RunDirectory, arrive: Arrive, head: str, patience_s: float) -> int:
    """head: empty where the run directory says it. The file is looked at with every knock: inotify does not see what
    another machine writes to a network file system."""

    def locate() -> str | None:
        try:
            return head or json.loads((directory.path / ADDRESS).read_text())["head"]
        except FileNotFoundError:
            return None

    def say(line: str) -> None:
        who = arrive.hostname if arrive.rank == JOINS else f"node {arrive.rank}"
        print(f"{who}: {line}", flush=True)

    return asyncio.run(Worker(directory, arrive, locate, patience_s=patience_s, say=say).run())


def _arrive(options: argparse.Namespace, rank: int) -> Arrive:
    return Arrive(rank, options.start_id, socket.gethostname(), visible_gpus(), options.generators)


def _resolve(host: str) -> str:
    """An IPv4 address, which is what ZeroMQ listens at."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"--head: {host!r} is no address and no name that resolves ({error.strerror})") from None


def _parser() -> argparse.ArgumentParser:
    environment = os.environ
    parser = argparse.ArgumentParser(prog="torchrun_cluster.sh", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="a TOML file, the same on all nodes")
    parser.add_argument("--run-dir", help="on a file system that all nodes share; default: runs/<name of the recipe>")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe"
    )
    parser.add_argument("--no-report", action="store_true", help="no plots and report.html at the end")
    text = "default: NNODES, or 1"
    parser.add_argument("--nodes", type=int, default=int(environment.get("NNODES", "1")), help=text)
    text = "default: NODE_RANK, or 0, the head"
    parser.add_argument("--node-rank", type=int, default=int(environment.get("NODE_RANK", "0")), help=text)
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", str(DEFAULT_PORT))
    text = f"where node 0 listens; default: MASTER_ADDR:MASTER_PORT, or 127.0.0.1:{DEFAULT_PORT}"
    parser.add_argument("--head", default=f"{address}:{port}", metavar="HOST:PORT", help=text)
    text = "spread the learner's ranks evenly over so many nodes; default: over as few as have room"
    parser.add_argument("--learner-nodes", type=int, default=0, metavar="N", help=text)
    text = "bring generators to the run that is at work in DIR"
    parser.add_argument("--join", metavar="DIR", help=text)
    text = "with --join: so many; default: one for each GPU, one without any"
    parser.add_argument("--generators", type=int, default=0, metavar="N", help=text)
    text = f"seconds that a node, or the head, is waited for; default: {PATIENCE_S:.0f}"
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="SECONDS", help=text)
    text = "nodes of another start are refused; default: ASYNC_RL_START_ID, or any"
    parser.add_argument("--start-id", default=environment.get("ASYNC_RL_START_ID", ""), metavar="ID", help=text)
    return parser


if __name__ == "__main__":
    main()
