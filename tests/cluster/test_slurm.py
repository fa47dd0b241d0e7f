"""The batch files on a real Slurm: every promise is kept, whatever becomes of job and nodes."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .conftest import ROOT, SORT, held, sets
from .slurm_cluster import SlurmCluster, missing

ROLLOUTS = 64
LOOK_S = 0.1


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds Unix sockets
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root)


class Job:
    """A submitted batch file."""

    def __init__(self, slurm: SlurmCluster, output: Path, *arguments: object) -> None:
        self.slurm, self.output = slurm, output
        self.id = slurm.sbatch("--chdir", ROOT, "--output", output, "--time", "10", *arguments)

    def line(self, part: str, within: float = 90, *, after: int = 0) -> int:
        """Waits until this was printed, and returns where."""
        deadline = time.monotonic() + within
        while (found := self.printed.find(part, after)) < 0:
            assert time.monotonic() < deadline, f"no {part!r} for {within:.0f} s in:\n{self.printed}"
            assert self.slurm.state(self.id) not in ("FAILED", "COMPLETED", "CANCELLED"), self.printed
            time.sleep(LOOK_S)
        return found

    def completes(self, within: float = 120) -> None:
        state = self.slurm.wait_state(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", within=within)
        assert state == "COMPLETED", f"{state}\n{self.printed}"

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def run_job(slurm: SlurmCluster, tmp_path: Path, *overrides: str, options: tuple[object, ...] = ()) -> Job:
    batch = ["launch/slurm.sbatch", SORT, "--run-dir", tmp_path / "run", "--no-report", *sets(*overrides)]
    return Job(slurm, tmp_path / "job.out", "--nodes", 2, *options, *batch)


def service(tmp_path: Path, name: str) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if name in command and str(tmp_path / "run") in command:
            return process
    raise AssertionError(f"there is no {name}")


def test_a_run_on_two_nodes_with_a_gpu_for_each_service(slurm: SlurmCluster, tmp_path: Path) -> None:
    # Slurm has gpus here, and torch has none: the services get their share, and compute on the CPU all the same
    recipe = ("steps=150", "learner.ranks=2", "generator.count=2")
    job = run_job(slurm, tmp_path, *recipe, options=("--gpus-per-node", 2))
    job.line("\nstep")
    found = {}
    for name in ("learner-0", "learner-1", "generator-0", "generator-1"):
        environment = service(tmp_path, name).environ()
        found[name] = environment["SLURMD_NODENAME"], environment["CUDA_VISIBLE_DEVICES"]
    assert found == {
        "learner-0": ("n1", "0,1"),
        "learner-1": ("n1", "0,1"),
        "generator-0": ("n2", "0"),
        "generator-1": ("n2", "1"),
    }
    job.completes()
    held(tmp_path / "run", 150 * ROLLOUTS)


def test_a_warned_run_saves_itself_and_its_requeued_job_continues(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = run_job(slurm, tmp_path, "steps=150", "checkpoint.every_steps=1000")
    job.line("\nstep")
    slurm.scancel("--signal=USR1", job.id)  # as --signal does before the time limit
    slurm.wait_state(job.id, "PENDING")
    assert "saving the last checkpoint" in job.printed, job.printed
    saved = [int(path.name[1:]) for path in (tmp_path / "run" / "checkpoints").glob("v*")]
    slurm.begin_now(job.id)
    job.line(f"continues from step {saved[0]} ")
    job.completes()
    held(tmp_path / "run", 150 * ROLLOUTS)
    assert "died" not in job.printed


def test_a_node_that_dies_costs_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = run_job(slurm, tmp_path, "steps=150")
    job.line("\nstep")
    slurm.kill_node("n2")
    job.line("DUE TO NODE FAILURE")
    slurm.wait_state(job.id, "PENDING")  # Slurm requeues it, and there is another node
    slurm.begin_now(job.id)
    job.line("the learner continues from step")
    assert service(tmp_path, "generator-0").environ()["SLURMD_NODENAME"] == "n3"
    job.completes()
    held(tmp_path / "run", 150 * ROLLOUTS)
    slurm.start_node("n2")
    slurm.wait_node("n2", "idle")


def test_a_second_job_brings_generators_and_outlives_the_requeue_of_the_first(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    batch = ["launch/slurm_generators.sbatch", tmp_path / "run", "--generators", 2]
    more = Job(slurm, tmp_path / "more.out", *batch)
    job = run_job(slurm, tmp_path, "steps=150")
    first = job.line("joins with generator-1, generator-2")
    slurm.scancel("--signal=USR1", job.id)
    more.line("the run stops, and will be started again")
    slurm.wait_state(job.id, "PENDING")
    slurm.begin_now(job.id)
    job.line("joins with generator-1, generator-2", after=first + 1)
    job.completes()
    more.completes()
    held(tmp_path / "run", 150 * ROLLOUTS)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["generator"]["count"] == 1
