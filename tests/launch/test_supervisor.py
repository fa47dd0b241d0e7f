"""What the supervisor does when services and machines come and go: in virtual time, the test lets processes die."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from async_rl.launch.process import Order, Process
from async_rl.launch.supervisor import LOST, Outcome, Seat, ServiceFailed, Supervisor

from async_rl import recipes
from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.layout import Placed, lay_out
from async_rl.telemetry.run_directory import RunDirectory

SORT = Path(__file__).resolve().parents[2] / "recipes" / "sort.toml"
PATIENCE_S = 300.0


class Service(Process):
    """As a supervisor sees one; what happens to it is up to the test."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.stopped_within: float | None = None
        self._events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def tell(self, kind: str, data: Any = None) -> None:
        self._events.put_nowait((kind, data))

    def end(self, code: int) -> None:
        if not self._code.done():
            self._events.put_nowait(None)
            self._code.set_result(code)

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        while (event := await self._events.get()) is not None:
            yield event

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    def stop(self, within_s: float) -> None:
        self.stopped_within = within_s

    def kill(self) -> None:
        self.end(-signal.SIGKILL)


class FakeMachine:
    """There, until `cut`; again after `back`."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[Service] = asyncio.Queue()
        self.running: list[Service] = []
        self._there = asyncio.Event()
        self._there.set()

    async def start(self, order: Order) -> Service:
        service = Service(order)
        self.running.append(service)
        self.started.put_nowait(service)
        return service

    async def present(self, *, needed: bool) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S if needed else None):
                await self._there.wait()
        except TimeoutError:
            raise ServiceFailed("node 1 was not there") from None

    def cut(self) -> None:
        self._there.clear()
        for service in self.running:
            service.end(LOST)

    def back(self) -> None:
        self._there.set()

    async def next(self, name: str) -> Service:
        """The next one that is started here, which has to be this one; it is ready."""
        service = await self.started.get()
        assert service.order.name == name
        if service.order.connect:
            service.tell("ready")
        return service


class Cluster:
    """A run on two machines: controller and learner here, two generators there; or as placed."""

    address = "127.0.0.1"

    def __init__(self, tmp_path: Path, *overrides: str) -> None:
        run: Run = recipes.load(SORT, ["generator.count=2", *overrides])
        self.here, self.there = FakeMachine(), FakeMachine()
        directory = RunDirectory(tmp_path)
        self.said: list[str] = []
        self._placed = lay_out(run, [[], []], learner_machines=min(2, run.learner.ranks))
        here: Any = self.here
        self.supervisor = Supervisor(run, directory, lambda kind, data: self.said.append(f"{kind} {data}"), self, here)

    async def seats(self) -> Sequence[Seat]:
        machines = [self.here, self.there]
        where = {"learner-0": 0}
        return [Seat(one, machines[where.get(one.name, 1)]) for one in self._placed]

    def opened(self) -> None:
        self.said.append("opened")

    async def begun(self) -> Service:
        """The controller, once it is ready."""
        controller = await self.here.next("controller")
        controller.tell("ready", {"rollouts": "tcp://r", "training": "tcp://t", "admin": "http://a"})
        return controller


def driven(cluster: Callable[[], Cluster], test: Callable[[Cluster], Any]) -> Any:
    async def main() -> tuple[Outcome, Cluster]:
        made = cluster()
        running = asyncio.create_task(made.supervisor.run())
        driving = asyncio.create_task(test(made))
        await asyncio.wait({running, driving}, return_when=asyncio.FIRST_COMPLETED)
        if driving.done():
            driving.result()
        outcome = await running
        await driving
        return outcome, made

    return main()


def complete(controller: Service) -> None:
    controller.tell("end", {"complete": True})
    controller.end(0)


def test_services_are_told_where_the_controller_is_and_leave_when_it_says_so(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        controller = await cluster.begun()
        learner = await cluster.here.next("learner-0")
        assert (learner.order.connect, controller.order.connect) == ("tcp://t", "")
        generators = [await cluster.there.next(f"generator-{index}") for index in range(2)]
        assert {one.order.connect for one in generators} == {"tcp://r"}
        for one in (learner, *generators):
            one.end(0)
        complete(controller)

    outcome, cluster = virtual(driven(lambda: Cluster(tmp_path), test))
    assert outcome == "complete" and cluster.said == ["dashboard http://a", "opened"]


def test_a_lost_generator_machine_is_waited_for_while_another_generator_works(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        controller = await cluster.begun()
        await cluster.here.next("learner-0")
        extra = FakeMachine()
        cluster.supervisor.add([Seat(Placed("generator", "generator-2", 2, {}), extra)])
        await extra.next("generator-2")
        cluster.there.cut()
        await asyncio.sleep(3 * PATIENCE_S)
        while not cluster.there.started.empty():
            cluster.there.started.get_nowait()
        cluster.there.back()
        assert {(await cluster.there.started.get()).order.name for _ in range(2)} == {"generator-0", "generator-1"}
        extra.cut()
        cluster.supervisor.remove(extra)
        complete(controller)

    outcome, cluster = virtual(driven(lambda: Cluster(tmp_path), test))
    assert outcome == "complete" and not [line for line in cluster.said if "died" in line]


def test_without_any_generator_the_run_waits_only_so_long(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.begun()
        await cluster.here.next("learner-0")
        await cluster.there.next("generator-0")
        await cluster.there.next("generator-1")
        cluster.there.cut()

    with pytest.raises(ServiceFailed, match="node 1 was not there"):
        virtual(driven(lambda: Cluster(tmp_path), test))


def test_a_lost_rank_takes_all_ranks_with_it_and_they_meet_at_another_port(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        controller = await cluster.begun()
        first = await cluster.here.next("learner-0")
        second = await cluster.there.next("learner-1")
        assert first.order.environment["MASTER_ADDR"] == second.order.environment["MASTER_ADDR"] == "127.0.0.1"
        await cluster.there.next("generator-0")
        cluster.there.cut()
        assert await first.wait() == -signal.SIGKILL
        assert cluster.here.started.empty()
        while not cluster.there.started.empty():
            cluster.there.started.get_nowait()
        cluster.there.back()
        again = await cluster.here.next("learner-0")
        assert again.order.environment["RANK"] == "0"
        complete(controller)

    outcome, _ = virtual(driven(lambda: Cluster(tmp_path, "learner.ranks=2", "generator.count=1"), test))
    assert outcome == "complete"


def test_a_dead_controller_ends_all_and_all_is_started_again(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        controller = await cluster.begun()
        learner = await cluster.here.next("learner-0")
        generator = await cluster.there.next("generator-0")
        controller.end(-signal.SIGKILL)
        assert await learner.wait() == await generator.wait() == -signal.SIGKILL
        complete(await cluster.begun())

    outcome, cluster = virtual(driven(lambda: Cluster(tmp_path), test))
    assert outcome == "complete" and "say controller died (SIGKILL): started again" in cluster.said


@pytest.mark.parametrize(("warned", "outcome", "within_s"), [(False, "stopped", 3.5), (True, "again", 99.0)])
def test_stop_gives_the_controller_its_time(
    virtual: Any, tmp_path: Path, warned: bool, outcome: str, within_s: float
) -> None:
    async def test(cluster: Cluster) -> None:
        controller = await cluster.begun()
        await cluster.here.next("learner-0")
        cluster.supervisor.stop(warned=warned)
        cluster.supervisor.stop(warned=warned)  # as every node asks: nobody is killed for it
        await asyncio.sleep(within_s - 0.1)
        assert controller.stopped_within == within_s
        controller.tell("end", {"complete": False})
        controller.end(130)

    assert virtual(driven(lambda: Cluster(tmp_path), test))[0] == outcome


def test_an_error_that_a_service_reports_ends_the_run(virtual: Any, tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        await cluster.begun()
        await cluster.here.next("learner-0")
        generator = await cluster.there.next("generator-0")
        generator.tell("error", "generator.device = 'tpu': write auto")
        generator.end(2)

    with pytest.raises(UserError, match="write auto"):
        virtual(driven(lambda: Cluster(tmp_path), test))
