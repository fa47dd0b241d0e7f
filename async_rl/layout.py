"""Pure: which machine runs what, and which GPUs each service sees.

The first machine runs the controller and the learner's rank 0. Where a service computes on a GPU it has that to
itself: the learner's ranks take the first GPUs in order, the generators those that are left. Elsewhere the learner's
ranks stand together, and each generator goes where least is running.

                     machine 0, 4 GPUs                          machine 1, 4 GPUs
    ranks 2          controller, learner-0 on 0, learner-1 on 1
    generators 6     generator-0 on 2, generator-1 on 3         generator-2 on 0 ... generator-5 on 3
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from async_rl.config import Run
from async_rl.errors import UserError

GPUS = "CUDA_VISIBLE_DEVICES"
SIZE_OPTIONS = ("--tp-size", "--tensor-parallel-size", "--tp", "--pp-size", "--pipeline-parallel-size", "--pp")
"""Arguments of a SGLang server that multiply its GPUs."""


class Placed(msgspec.Struct, frozen=True):
    """One service on one machine."""

    role: str
    name: str
    machine: int
    environment: dict[str, str]
    """torchrun's variables of a rank; the GPUs it sees, where it has some to itself."""


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them. Without torch, whose import takes seconds."""
    if GPUS in environment:
        return [name for name in environment[GPUS].split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    found = [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    return [str(index) for index in range(len(found))]


def lay_out(run: Run, gpus: Sequence[Sequence[str]], *, learner_machines: int = 0) -> list[Placed]:
    """Learner ranks in order, then generators.

    Args:
        gpus: the GPUs of each machine.
        learner_machines: ranks are spread evenly over so many machines; 0 = over as few as have room.

    Raises:
        UserError: there are too few machines or GPUs.
    """
    machines = len(gpus)
    if learner_machines > min(machines, run.learner.ranks):
        raise UserError(
            f"--learner-nodes {learner_machines}: {run.learner.ranks} ranks and {machines} machines; write at most "
            f"{min(machines, run.learner.ranks)}"
        )
    left = [list(names) for names in gpus]
    any_gpus = any(gpus)
    shared = run.colocated or sum(map(len, gpus)) == 1  # of one GPU all have a share: docs/colocated.md
    learners = _ranks(run, left, learner_machines, on_gpu=any_gpus and needs_gpu(run.learner.device), shared=shared)
    running = [sum(one.machine == machine for one in learners) for machine in range(machines)]
    generators: list[Placed] = []
    each = gpus_of_generator(run) if any_gpus else 0
    for index in range(run.generator.count):
        if each and not shared:
            machine = next((number for number, names in enumerate(left) if len(names) >= each), None)
            if machine is None:
                raise _too_few_for_generators(run, gpus, index, each)
            environment = {GPUS: ",".join(left[machine][:each])}
            del left[machine][:each]
        else:
            machine = 0 if run.colocated else min(range(machines), key=lambda number: (running[number], -number))
            environment = {}
        running[machine] += 1
        generators.append(Placed("generator", f"generator-{index}", machine, environment))
    return [*learners, *generators]


def needs_gpu(device: str) -> bool:
    """Whether we choose its GPU: the recipe names none, and does not say cpu."""
    return device in ("auto", "cuda")


def gpus_of_generator(run: Run) -> int:
    """GPUs that one generator takes where there are any, its SGLang server's included."""
    generator = run.generator
    if generator.engine == "embedded":
        return int(needs_gpu(generator.device))
    own = int(generator.sglang.backend == "nccl")  # it sends the weights from a GPU that no server uses
    if generator.sglang.attach or not needs_gpu(generator.device):
        return own
    return own + _server_gpus(generator.sglang.arguments)


def _server_gpus(arguments: Sequence[str]) -> int:
    gpus = 1
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for option, value in itertools.pairwise(words):
        if option in SIZE_OPTIONS and value.isdecimal():
            gpus *= int(value)
    return gpus


def _ranks(run: Run, left: list[list[str]], learner_machines: int, *, on_gpu: bool, shared: bool) -> list[Placed]:
    """Takes the GPUs it uses out of `left`."""
    ranks = run.learner.ranks
    most = -(-ranks // (learner_machines or 1))
    room = [min(most, len(names)) if on_gpu else most for names in left]
    if on_gpu and (not room[0] or sum(room[: learner_machines or None]) < ranks):
        raise _too_few_for_learner(ranks, [len(names) for names in left], learner_machines)
    placed: list[Placed] = []
    for machine, most_here in enumerate(room):
        here = min(most_here, ranks - len(placed))
        for local in range(here):
            environment: dict[str, str] = {}
            if ranks > 1:
                environment |= {"RANK": str(len(placed)), "LOCAL_RANK": str(local), "WORLD_SIZE": str(ranks)}
                environment |= {"LOCAL_WORLD_SIZE": str(here)}
            if on_gpu and not shared:
                environment[GPUS] = ",".join(left[machine][:here])
            placed.append(Placed("learner", f"learner-{len(placed)}", machine, environment))
        if on_gpu and not shared:
            del left[machine][:here]
    return placed


def _too_few_for_learner(ranks: int, gpus: list[int], learner_machines: int) -> UserError:
    if not gpus[0]:
        return UserError("node 0 has no GPU, but the learner's rank 0 runs there: start node 0 on a machine with GPUs")
    found = _found(gpus[: learner_machines or None])
    return UserError(
        f"learner.ranks = {ranks}: each takes a GPU, and {found}; write {sum(gpus[: learner_machines or None])} or "
        "less, start more nodes, or write learner.device = 'cpu'"
    )


def _too_few_for_generators(run: Run, gpus: Sequence[Sequence[str]], fits: int, each: int) -> UserError:
    ranks = run.learner.ranks if needs_gpu(run.learner.device) else 0
    takes = f"takes {each} GPUs of one machine" if each > 1 else "takes a GPU"
    return UserError(
        f"generator.count = {run.generator.count}: each {takes}, and {_found([len(names) for names in gpus])}, of "
        f"which the learner has {ranks}; {f'write {fits}, ' if fits else ''}start more nodes, or let both share one "
        "GPU in turns: placement = 'colocated'"
    )


def _found(gpus: Sequence[int]) -> str:
    total = f"{sum(gpus)} GPU{'' if sum(gpus) == 1 else 's'}"
    return f"this machine has {total}" if len(gpus) == 1 else f"{len(gpus)} nodes have {total}"
