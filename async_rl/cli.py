"""The command line.

    async-rl train RECIPE [--run-dir DIR] [--set section.key=value ...]
    async-rl serve ROLE --config run.toml --run-dir DIR [--connect ADDRESS]
    async-rl inspect RUN [--check]

Exit codes: 0 done, 1 failed, 2 the input is wrong (one line says what), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from async_rl import config
from async_rl.environments.api import find, make_tasks
from async_rl.errors import AsyncRLError, UserError
from async_rl.telemetry.exporters import check_exporters
from async_rl.telemetry.progress import Progress
from async_rl.telemetry.run_directory import RunDirectory

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_STOPPED = 1, 2, 130
ROLES = ("controller", "generator", "learner")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        code = options.command(options)
    except UserError as error:
        print(f"async-rl: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except AsyncRLError as error:
        print(f"async-rl: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:  # before or after launch.local listens for it: nothing is running
        code = EXIT_STOPPED
    sys.exit(code)


def train(options: argparse.Namespace) -> int:
    """Train a recipe on this machine, from the start or from where the run directory stands."""
    recipe = Path(options.recipe)
    run = config.load(recipe, options.set)
    make_tasks(find(run.environment), run.environment.options, run.seed)
    check_exporters(run)
    directory = RunDirectory(Path(options.run_dir or f"runs/{recipe.stem}"))
    continues = directory.config.exists()
    directory.create(run)
    if directory.is_complete(run):
        print(f"{directory.path} is complete ({run.steps} steps): choose another --run-dir, or more steps")
        return 0
    print(f"{'continuing' if continues else 'starting'} {recipe} in {directory.path}", flush=True)
    progress = Progress(run.steps)

    def watch(kind: str, data: Any) -> None:
        line = progress.line(kind, data, time.monotonic())
        if line is not None:
            print(line, flush=True)

    complete = importlib.import_module("async_rl.launch.local").train(run, directory, watch)
    return 0 if complete else EXIT_STOPPED


def serve(options: argparse.Namespace) -> NoReturn:
    """Run one service in this process."""
    child = importlib.import_module("async_rl.launch.child")
    parent = child.Parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path = Path(options.config)
    try:
        run = RunDirectory(path.parent).load_config() if path.name == "config.json" else config.load(path)
        service = importlib.import_module(f"async_rl.services.{options.role}")
        name = options.name or f"{options.role}-0"
        code = service.main(run, child.ServeOptions(Path(options.run_dir), name, options.connect), parent)
    except* UserError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        parent.tell("error", str(error))
        raise UserError(str(error)) from None
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is closed; gloo would abort a process that ends while a dropped group hangs in TCP


def inspect(options: argparse.Namespace) -> int:
    """What a run directory holds; with --check, whether its promises were kept."""
    inspection = importlib.import_module("async_rl.ledger.inspection")
    directory = RunDirectory(Path(options.run))
    run = directory.load_config()
    report = inspection.inspect(directory.ledger, max_staleness=run.staleness.max_staleness)
    if options.check:
        print(json.dumps(report))
        return 0 if inspection.holds(report) else EXIT_FAILED
    rows = directory.load_metrics()
    print(f"{directory.path}: {len(rows)} of {run.steps} steps")
    if rows:
        print(f"reward {rows[0]['reward']:.3f} -> {rows[-1]['reward']:.3f}, {rows[-1]['wall_s']:.1f} s")
    print("rollouts: " + ", ".join(f"{name} {count}" for name, count in report.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="async-rl", description="Asynchronous RL post-training of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("train", help=train.__doc__, description=train.__doc__)
    one.add_argument("recipe", help="a TOML file, such as recipes/sort.toml")
    one.add_argument("--run-dir", help="default: runs/<name of the recipe>; an existing one is continued")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe")
    one.set_defaults(command=train)
    one = commands.add_parser("serve", help=serve.__doc__, description=serve.__doc__)
    one.add_argument("role", choices=ROLES)
    one.add_argument("--config", required=True, help="the recipe (TOML), or config.json of a run directory")
    one.add_argument("--run-dir", required=True)
    one.add_argument("--connect", default="", help="address of the controller's stream for this role")
    one.add_argument("--name", default="", help="stable across restarts; default: ROLE-0")
    one.set_defaults(command=serve)
    one = commands.add_parser("inspect", help=inspect.__doc__, description=inspect.__doc__)
    one.add_argument("run", help="a run directory")
    one.add_argument("--check", action="store_true", help="JSON on stdout, exit code 1 if a promise was broken")
    one.set_defaults(command=inspect)
    return parser


if __name__ == "__main__":
    main()
