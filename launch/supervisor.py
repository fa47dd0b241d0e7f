"""Start the services of a run as processes, watch over them, end them all; on this machine and on others.

controller dies            everything is started again; the ledger says where to go on
learner or generator dies  it is started again; the others go on
a machine is gone          its generators are missing until it is back; learner ranks are waited for
a service reports an error everything ends, one line says why, exit code 2
Ctrl-C, SIGTERM            the controller is asked to stop; after STOP_TIMEOUT_S whoever is left is killed
SIGUSR1                    the same with more time: a scheduler warns that this machine is wanted back
this process dies          every child sees its pipe close and exits (launch.child)
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from async_rl.launch.child import STOP_VARIABLE
from async_rl.launch.process import Here, Order, Process, log_of

from async_rl.config import Run
from async_rl.errors import AsyncRLError, UserError
from async_rl.layout import Placed
from async_rl.listening import listen
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.weights.places import cleanup

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 4.5
"""From Ctrl-C to the last SIGKILL; the user gets the prompt back within 5 s."""
WARNED_STOP_TIMEOUT_S = 100.0
"""The same after SIGUSR1, unless STOP_VARIABLE says otherwise: long enough for a checkpoint."""
LAST_CHECKPOINT_S = 1.0
"""Of these, so many are not for the controller: it has to leave too."""
END_TIMEOUT_S = 20.0
"""How long services may take to leave after the controller ended the run."""
MAX_RESTARTS = 8
"""In a row, without a step in between: then something is broken that a restart does not mend."""
LOST = 256
"""Instead of an exit code: the machine of this service is gone."""

Watch = Callable[[str, Any], None]
"""(kind, data) of what the services tell: step, evaluation, say, summary; and dashboard, its URL"""
Outcome = Literal["complete", "stopped", "again"]
"""Of a run. again: it was stopped because the machine is wanted back, so it should be started again."""
T = TypeVar("T")
CONTROLLER = Placed("controller", "controller", 0, {})


class ServiceFailed(AsyncRLError):
    """A service kept dying, or a machine is missing; the message says what to look at."""


class Child(Protocol):
    """One process, here (launch.process) or elsewhere (launch.head)."""

    def events(self) -> AsyncIterator[tuple[str, Any]]: ...

    async def wait(self) -> int: ...

    def kill(self) -> None: ...


class Machine(Protocol):
    """Where services are started."""

    async def start(self, order: Order) -> Child: ...

    async def present(self, *, needed: bool) -> None:
        """Returns when it is there. needed: the run cannot go on without, so that it has a deadline.

        Raises:
            ServiceFailed: it did not come.
        """
        ...


@dataclass(frozen=True)
class Seat:
    """One service and where it is started, again and again."""

    placed: Placed
    machine: Machine


class Fleet(Protocol):
    """The machines of a run."""

    address: str
    """Of the first one, where the learner's ranks meet."""

    async def seats(self) -> Sequence[Seat]:
        """Of all services but the controller, learner ranks in order first, once all machines are there.

        Raises:
            ServiceFailed: one did not come. UserError: they are too few.
        """
        ...

    def opened(self) -> None:
        """The controller holds the run directory."""
        ...


class Service:
    """One child process."""

    def __init__(self, seat: Seat, process: Child) -> None:
        self.seat, self.process = seat, process
        self.role, self.name = seat.placed.role, seat.placed.name
        self.replaced = False
        """Killed by us: others take its place, or nobody does."""
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.error: str | None = None


class Supervisor:
    """`await run()` to the end of the run; made in a running loop."""

    def __init__(self, run: Run, directory: RunDirectory, watch: Watch, fleet: Fleet, here: Here) -> None:
        self._run, self._directory, self._watch, self._fleet, self._here = run, directory, watch, fleet, here
        self._seats: list[Seat] = []
        """Of all but the controller; who joins later is the last."""
        self._services: dict[str, Service] = {}
        self._addresses: dict[str, str] = {}
        self._complete: bool | None = None
        """What the controller said at its end."""
        self._stopping: Outcome | None = None
        self._restarts = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the session is: of all services, until the controller ends."""
        self._open = False
        """Generators are started as they come."""

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted)
        loop.add_signal_handler(signal.SIGUSR1, self._warned)
        try:
            self._seats = [*await self._first_seats(), *self._seats]
            while self._complete is None and self._stopping is None:
                self._over = loop.create_future()
                await self._session()
        finally:
            self._kill_all()
            await asyncio.gather(*(service.process.wait() for service in list(self._services.values())))
            cleanup(self._directory.path)  # a learner that was killed has left its files in memory
        return "complete" if self._complete else self._stopping or "stopped"

    @property
    def ending(self) -> bool:
        """Services are meant to go."""
        return self._stopping is not None or self._complete is not None

    def stop(self, *, warned: bool = False) -> None:
        """Ask for an orderly end, as by Ctrl-C or SIGUSR1; nothing where it was asked for before."""
        if warned:
            self._warned()
        elif self._stopping is None:
            self._interrupted()

    def add(self, seats: Sequence[Seat]) -> None:
        """Generators that join while the run is at work."""
        self._seats += seats
        if self._open and not self._over.done():
            self._start(seats)

    def remove(self, machine: Machine) -> None:
        """It is gone for good: nobody waits for what ran there."""
        self._seats = [seat for seat in self._seats if seat.machine is not machine]
        for service in self._services.values():
            service.replaced |= service.seat.machine is machine

    async def _first_seats(self) -> Sequence[Seat]:
        """Nothing where somebody asks to stop before all machines are there."""
        return await self._unless_over(self._fleet.seats()) or []

    async def _unless_over(self, work: Coroutine[Any, Any, T]) -> T | None:
        """None: the session ended first."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._over}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()

    async def _session(self) -> None:
        """Every service once, until the controller ends or something fails."""
        self._addresses, self._open = {}, False
        try:
            async with asyncio.TaskGroup() as self._tasks:
                watching = self._tasks.create_task(self._start_all(), name="start")
                await self._over
                watching.cancel()
                await self._leave()
        except* AsyncRLError as group:
            raise group.exceptions[0] from None

    async def _start_all(self) -> None:
        controller = await self._spawn(Seat(CONTROLLER, self._here))
        self._addresses = await self._when_ready(controller)
        self._fleet.opened()
        await self._start_learner()
        self._open = True
        self._start([seat for seat in self._seats if seat.placed.role == "generator"])

    async def _start_learner(self) -> None:
        """All ranks, once their machines are there."""
        ranks = [seat for seat in self._seats if seat.placed.role == "learner"]
        for seat in ranks:
            await self._unless_over(seat.machine.present(needed=True))
        for seat in ranks:
            await self._spawn(seat)

    def _start(self, generators: Sequence[Seat]) -> None:
        for seat in generators:
            self._tasks.create_task(self._start_generator(seat), name=f"start {seat.placed.name}")

    async def _start_generator(self, seat: Seat) -> None:
        """Once its machine is there; the run can wait for that as long as it has others."""
        try:
            await self._unless_over(seat.machine.present(needed=True))
        except ServiceFailed:
            if not any(service.role == "generator" for service in self._services.values()):
                raise
            await self._unless_over(seat.machine.present(needed=False))
        if seat in self._seats and not self._over.done():
            await self._spawn(seat)

    async def _when_ready(self, service: Service) -> Any:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(service.ready)
        except TimeoutError:
            raise ServiceFailed(
                f"{service.name} was not ready after {START_TIMEOUT_S:.0f} s: see {self._log(service)}"
            ) from None

    async def _spawn(self, seat: Seat) -> Service:
        process = await seat.machine.start(self._order(seat.placed))
        service = self._services[seat.placed.name] = Service(seat, process)
        if self._over.done():
            process.kill()  # the session ended while it was being made
        self._tasks.create_task(self._attend(service), name=service.name)
        self._tasks.create_task(self._when_ready(service), name=f"{service.name} ready")
        return service

    def _order(self, placed: Placed) -> Order:
        stream = {"generator": "rollouts", "learner": "training"}.get(placed.role)
        environment = dict(placed.environment)
        if "RANK" in environment:
            environment |= {"MASTER_ADDR": self._fleet.address, "MASTER_PORT": str(self._rendezvous_port())}
        return Order(placed.role, placed.name, self._addresses[stream] if stream else "", environment)

    def _rendezvous_port(self) -> int:
        if "rendezvous" not in self._addresses:
            with listen(self._fleet.address, field="controller.host", owner="controller") as probe:
                self._addresses["rendezvous"] = str(probe.getsockname()[1])
        return int(self._addresses["rendezvous"])

    async def _attend(self, service: Service) -> None:
        """Read what it tells until it is gone; then decide what that means."""
        async for kind, data in service.process.events():
            self._told(service, kind, data)
        self._ended(service, await service.process.wait())

    def _told(self, service: Service, kind: str, data: Any) -> None:
        match kind:
            case "ready":
                service.ready.set_result(data)
                if service.role == "controller":
                    self._watch("dashboard", data["admin"])
            case "error":
                service.error = data
            case "end":
                self._complete = data["complete"]
            case _:
                if kind == "step":
                    self._restarts = 0
                self._watch(kind, data)

    def _ended(self, service: Service, code: int) -> None:
        if self._services.get(service.name) is service:
            del self._services[service.name]
        was_ready = service.ready.done()
        service.ready.cancel()
        if self._over.done() or service.replaced:
            return
        if service.error is not None:
            raise UserError(service.error)
        if service.role == "controller" and self._complete is not None:
            self._over.set_result(None)
            return
        if self._stopping is not None:
            if service.role == "controller":
                self._over.set_result(None)
            return
        if self._complete is not None or code == 0:
            return  # told to leave
        if code != LOST:  # the fleet has said that a machine is gone
            self._died(f"{service.name} died ({_describe(code)})", service, mended=code < 0 or was_ready)
        if service.role == "controller":
            self._over.set_result(None)
        elif service.role == "learner":
            self._tasks.create_task(self._restart_learner(), name="restart learner")
        else:
            self._start([service.seat])

    def _died(self, what: str, service: Service, *, mended: bool) -> None:
        """mended: as far as we know, by starting it again."""
        self._restarts += 1
        if self._restarts > MAX_RESTARTS or not mended:
            raise ServiceFailed(f"{what}: see {self._log(service)}")
        self._watch("say", f"{what}: started again")

    async def _restart_learner(self) -> None:
        """All ranks: those that are left wait for the dead one in a collective."""
        left = [service for service in self._services.values() if service.role == "learner"]
        for service in left:
            service.replaced = True
            service.process.kill()
            await service.process.wait()
        self._addresses.pop("rendezvous", None)
        await self._start_learner()

    async def _leave(self) -> None:
        """The controller is gone: the others have been told, or are killed."""
        loop = asyncio.get_running_loop()
        deadline = END_TIMEOUT_S if self._complete else 0.0 if self._complete is None else 1.0
        timer = loop.call_later(deadline, self._kill_all)
        await asyncio.gather(*(service.process.wait() for service in list(self._services.values())))
        timer.cancel()

    def _interrupted(self) -> None:
        """Ctrl-C and its like: asked twice, kill."""
        if self._stopping is None:
            self._stop("stopped", STOP_TIMEOUT_S)
        else:
            self._kill_all()

    def _warned(self) -> None:
        """SIGUSR1."""
        if self._stopping is None:
            self._stop("again", float(os.environ.get(STOP_VARIABLE, WARNED_STOP_TIMEOUT_S)))

    def _stop(self, outcome: Outcome, within_s: float) -> None:
        self._stopping = outcome
        controller = self._services.get("controller")
        if controller is None or not controller.ready.done():
            self._kill_all()
            if not self._over.done():
                self._over.set_result(None)
            return
        self._watch("say", "stopping: the run can be continued with the same command")
        assert isinstance(controller.process, Process)
        controller.process.stop(within_s - LAST_CHECKPOINT_S)
        asyncio.get_running_loop().call_later(within_s, self._kill_all)

    def _kill_all(self) -> None:
        for service in self._services.values():
            service.process.kill()

    def _log(self, service: Service) -> Path:
        return log_of(self._directory, service.name)


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
