"""`torchrun_cluster.sh` on several "nodes" of this machine, and the services started by hand."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import SCRIPT, SORT, held, sets

ROLLOUTS = 64


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def node(shell: Any, tmp_path: Path) -> Any:
    """Start a node: node(rank, override, ..., option=value)."""
    port = free_port()

    def start(rank: int, *overrides: str, nodes: int = 2, run_dir: Path | None = None, options: Any = ()) -> Any:
        command = [SCRIPT, SORT, "--run-dir", run_dir or tmp_path / "run", "--no-report", *sets(*overrides), *options]
        return shell(*command, NNODES=str(nodes), NODE_RANK=str(rank), MASTER_PORT=str(port))

    return start


def test_learner_ranks_and_generators_on_two_nodes_one_of_which_dies_and_comes_back(node: Any, tmp_path: Path) -> None:
    recipe = ["steps=300", "learner.ranks=2", "generator.count=2"]
    other = node(1)
    other.line("waiting for the head")
    head = node(0, *recipe, options=["--learner-nodes", "2"])
    head.line(" ess ")
    assert set(head.services()) == {"controller", "learner-0", "generator-1"}
    assert set(other.services()) == {"learner-1", "generator-0"}
    environment = other.services()["learner-1"].environ()
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    other.process.kill()
    head.line("node 1 is gone")
    again = node(1)
    head.line("node 1 is back")
    head.line("the learner continues from step")
    head.line(" ess ")
    head.process.kill()
    again.line("the head is gone")
    last = node(0, *recipe, options=["--learner-nodes", "2"])
    last.line("continuing")
    assert (last.end(), again.end()) == (0, 0), f"{last}{again}"
    held(tmp_path / "run", 300 * ROLLOUTS)


def test_generators_join_and_leave_a_run_at_work(node: Any, shell: Any, tmp_path: Path) -> None:
    head = node(0, "steps=100000", nodes=1)
    joined = shell(SCRIPT, "--join", tmp_path / "run", "--generators", "2")
    head.line("joins with generator-1, generator-2")
    head.line(" ess ")
    assert set(joined.services()) == {"generator-1", "generator-2"}
    joined.signal(signal.SIGTERM)
    assert joined.end(10) == 130, str(joined)
    head.line("which had joined")
    head.signal(signal.SIGUSR1)
    assert head.end(30) == 75, str(head)
    assert not (tmp_path / "run" / "cluster.json").exists()


def test_ctrl_c_on_any_node_stops_the_run_in_order_and_the_same_command_continues(node: Any, tmp_path: Path) -> None:
    head, other = node(0, "steps=300"), node(1)
    head.line(" ess ")
    other.signal(signal.SIGINT)
    assert (head.end(10), other.end(10)) == (130, 130), f"{head}{other}"
    head, other = node(0, "steps=300"), node(1)
    head.line("continuing")
    assert (head.end(), other.end()) == (0, 0), f"{head}{other}"
    held(tmp_path / "run", 300 * ROLLOUTS)


def test_nodes_that_do_not_belong_together_are_told_why(node: Any, tmp_path: Path) -> None:
    head = node(0, nodes=3, options=["--start-id", "7.0", "--patience", "15"])
    head.line("waiting at 127.0.0.1")
    strange = node(1, run_dir=tmp_path / "elsewhere", nodes=3, options=["--start-id", "7.0"])
    late = node(1, nodes=3, options=["--start-id", "6.0"])
    many = node(3, nodes=4, options=["--start-id", "7.0"])
    assert strange.end() == 2 and "write a --run-dir that all nodes share" in str(strange)
    assert late.end() == 2 and "it is part of start 6.0, and the head of 7.0" in str(late)
    assert many.end() == 2 and "node ranks go from 0, the head, to 2" in str(many)
    one = node(1, nodes=3, options=["--start-id", "7.0"])
    assert head.end() == 1 and "node 2 was not there for 15 s" in str(head), str(head)
    assert one.end() == 1 and "the run has failed: node 0 says why" in str(one), str(one)


def test_services_by_hand_with_the_learner_under_torchrun(shell: Any, tmp_path: Path) -> None:
    port, run = free_port(), tmp_path / "run"
    recipe = ["--run-dir", run, *sets("steps=30", "learner.ranks=2", f"controller.port={port}")]
    serve = [sys.executable, "-m", "async_rl.cli", "serve"]
    learner = ["learner", "--config", SORT, "--connect", f"tcp://127.0.0.1:{port + 1}", *recipe]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        "--no-python",
    ]
    started = [
        shell(*serve, "controller", "--config", SORT, *recipe),
        shell(*torchrun, "--master-port", free_port(), *serve, *learner),
        shell(*serve, "generator", "--config", SORT, "--connect", f"tcp://127.0.0.1:{port}", *recipe),
    ]
    assert [one.end() for one in started] == [0, 0, 0], "".join(map(str, started))
    held(run, 30 * ROLLOUTS)
