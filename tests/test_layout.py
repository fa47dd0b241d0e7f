"""Which machine runs what, and on which GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_rl import recipes
from async_rl.config import Run
from async_rl.doctor.machine import places
from async_rl.errors import UserError
from async_rl.layout import GPUS, Placed, lay_out, visible_gpus

SORT = Path(__file__).resolve().parents[1] / "recipes" / "sort.toml"
FOUR = ["0", "1", "2", "3"]


def recipe(*overrides: str) -> Run:
    return recipes.load(SORT, overrides)


def where(placed: list[Placed]) -> dict[str, tuple[int, str | None]]:
    return {one.name: (one.machine, one.environment.get(GPUS)) for one in placed}


def test_every_service_has_gpus_of_its_own() -> None:
    placed = lay_out(recipe("learner.ranks=2", "generator.count=6"), [FOUR, FOUR])
    assert where(placed) == {
        "learner-0": (0, "0,1"),  # by LOCAL_RANK
        "learner-1": (0, "0,1"),
        "generator-0": (0, "2"),
        "generator-1": (0, "3"),
        **{f"generator-{2 + index}": (1, str(index)) for index in range(4)},
    }
    assert [one.environment["LOCAL_RANK"] for one in placed[:2]] == ["0", "1"]


@pytest.mark.parametrize(("learner_machines", "machines"), [(0, [0, 0, 0, 0, 1, 1]), (2, [0, 0, 0, 1, 1, 1])])
def test_ranks_over_two_machines_are_numbered_as_torchrun_does(learner_machines: int, machines: list[int]) -> None:
    placed = lay_out(recipe("learner.ranks=6"), [FOUR, FOUR], learner_machines=learner_machines)
    ranks = [one for one in placed if one.role == "learner"]
    assert [one.machine for one in ranks] == machines
    assert [one.environment["RANK"] for one in ranks] == list("012345")
    for machine in (0, 1):
        local = [one.environment["LOCAL_RANK"] for one in ranks if one.machine == machine]
        assert local == [str(index) for index in range(machines.count(machine))]
        names = {one.environment[GPUS] for one in ranks if one.machine == machine}
        assert names == {",".join(FOUR[: machines.count(machine)])}
    assert placed[-1].environment[GPUS] not in ranks[-1].environment[GPUS] or placed[-1].machine != ranks[-1].machine


def test_names_of_gpus_are_taken_as_they_are() -> None:
    placed = lay_out(recipe(), [["GPU-8f", "GPU-c1"]])
    assert where(placed) == {"learner-0": (0, "GPU-8f"), "generator-0": (0, "GPU-c1")}


def test_one_gpu_is_shared() -> None:
    assert where(lay_out(recipe(), [["5"]])) == {"learner-0": (0, None), "generator-0": (0, None)}
    together = recipe('placement="colocated"', 'generator.device="auto"')
    assert where(lay_out(together, [FOUR, FOUR])) == {"learner-0": (0, None), "generator-0": (0, None)}


def test_a_device_that_the_recipe_names_is_left_to_it() -> None:
    placed = lay_out(recipe('learner.device="cuda:3"', "generator.count=4"), [FOUR])
    assert where(placed) == {"learner-0": (0, None), **{f"generator-{index}": (0, str(index)) for index in range(4)}}


def test_without_gpus_generators_go_where_least_is_running() -> None:
    assert [one.machine for one in lay_out(recipe("generator.count=3"), [[], []])] == [0, 1, 1, 0]
    assert [one.machine for one in lay_out(recipe("generator.count=2"), [[]])] == [0, 0, 0]
    spread = lay_out(recipe("learner.ranks=2", "generator.count=2"), [[], []], learner_machines=2)
    assert [one.machine for one in spread] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "backend", "gpus"),
    [
        ([], "gloo", "1"),
        (["--tp-size", "2"], "gloo", "1,2"),
        (["--tp=2"], "gloo", "1,2"),
        (["--tensor-parallel-size", "2"], "nccl", "1,2,3"),
        (["--tp", "3", "--pp-size=1"], "gloo", "1,2,3"),
    ],
)
def test_a_server_has_as_many_gpus_as_its_arguments_say(arguments: list[str], backend: str, gpus: str) -> None:
    sglang = ['generator.engine="sglang"', f"generator.sglang.arguments={arguments}"]
    placed = lay_out(recipe(*sglang, f'generator.sglang.backend="{backend}"'), [FOUR])
    assert where(placed)["generator-0"] == (0, gpus)


@pytest.mark.parametrize(
    ("overrides", "gpus", "options", "words"),
    [
        (["learner.ranks=5"], [FOUR], {}, "learner.ranks = 5: each takes a GPU, and this machine has 4 GPUs; write 4"),
        (["learner.ranks=4"], [FOUR], {}, "generator.count = 1: each takes a GPU, and this machine has 4 GPUs, of"),
        (["generator.count=9"], [FOUR, FOUR], {}, "2 nodes have 8 GPUs, of which the learner has 1; write 7"),
        ([], [[], FOUR], {}, "node 0 has no GPU, but the learner's rank 0 runs there"),
        ([], [[], []], {"learner_machines": 2}, "--learner-nodes 2: 1 ranks and 2 machines; write at most 1"),
    ],
)
def test_too_little_is_said_with_what_would_do(
    overrides: list[str], gpus: list[list[str]], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        lay_out(recipe(*overrides), gpus, **options)
    assert words in str(error.value)


def test_gpus_of_this_machine(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({GPUS: "3,MIG-ab"}, tmp_path) == ["3", "MIG-ab"]
    assert visible_gpus({GPUS: ""}, tmp_path) == visible_gpus({GPUS: "-1"}, tmp_path) == []


def test_the_doctor_says_who_has_which_gpu() -> None:
    fits = places(recipe(), FOUR)
    assert (fits.status, fits.detail) == ("ok", "learner-0 on 0, generator-0 on 1")
    assert places(recipe(), ["0"]).detail == "all on the one GPU" and places(recipe(), []).detail == "all on the CPU"
    lacks = places(recipe("generator.count=4"), FOUR)
    assert lacks.status == "warn" and "write 3, start more nodes" in lacks.detail
