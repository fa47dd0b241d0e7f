"""One machine: start the services of a run as processes, watch over them, end them all.

controller dies            everything is started again; the ledger says where to go on
learner or generator dies  it is started again; the others go on
a service reports an error everything ends, one line says why, exit code 2
Ctrl-C, SIGTERM            the controller is asked to stop; after STOP_TIMEOUT_S whoever is left is killed
this process dies          every child sees its pipe close and exits (launch.child)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from async_rl.launch.child import PIPE_VARIABLE

from async_rl.config import Run
from async_rl.errors import AsyncRLError, UserError
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.weights.places import cleanup

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 4.5
"""From Ctrl-C to the last SIGKILL; the user gets the prompt back within 5 s."""
END_TIMEOUT_S = 20.0
"""How long services may take to leave after the controller ended the run."""
MAX_RESTARTS = 8
"""In a row, without a step in between: then something is broken that a restart does not mend."""

MALLOC = {
    "mmap_threshold": 32 << 20,
    "trim_threshold": 512 << 20,
    "top_pad": 64 << 20,
    "arena_max": 1,
    "hugetlb": 1,
}
"""glibc.malloc tunables of the services. By default every large tensor is mapped, zeroed page by page and unmapped
again: a quarter of the time of a training step of SmolLM2 (2.9 million page faults in four steps; so, 60 thousand). A
higher mmap_threshold is no faster, and the heap grows by fragmentation."""

Watch = Callable[[str, Any], None]
"""(kind, data) of what the services tell: step, evaluation, say, summary"""


class ServiceFailed(AsyncRLError):
    """A service kept dying; the message names its log."""


class Service:
    """One child process."""

    def __init__(self, role: str, name: str, process: asyncio.subprocess.Process, pipe: socket.socket) -> None:
        self.role, self.name, self.process, self.pipe = role, name, process, pipe
        self.replaced = False
        """Killed by us: others take its place."""
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.error: str | None = None

    def kill(self) -> None:
        """SIGKILL, past Popen, whose kill polls first and takes the exit status from the loop's child watcher."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)


class Supervisor:
    """`await run()` to the end of the run. Returns whether it is complete."""

    def __init__(self, run: Run, directory: RunDirectory, watch: Watch) -> None:
        self._run, self._directory, self._watch = run, directory, watch
        self._services: dict[str, Service] = {}
        self._addresses: dict[str, str] = {}
        self._complete: bool | None = None
        """What the controller said at its end."""
        self._stopping = False
        self._restarts = 0
        self._over: asyncio.Future[None]

    async def run(self) -> bool:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        try:
            while self._complete is None and not self._stopping:
                self._over = loop.create_future()
                await self._session()
        finally:
            self._kill_all()
            await asyncio.gather(*(service.process.wait() for service in list(self._services.values())))
            cleanup(self._directory.path)  # a learner that was killed has left its files in memory
        return bool(self._complete)

    async def _session(self) -> None:
        """Every service once, until the controller ends or something fails."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                watching = self._tasks.create_task(self._start_all(), name="start")
                await self._over
                watching.cancel()
                await self._leave()
        except* AsyncRLError as group:
            raise group.exceptions[0] from None

    async def _start_all(self) -> None:
        controller = await self._spawn("controller", "controller")
        self._addresses = await self._when_ready(controller)
        for rank in range(self._run.learner.ranks):
            await self._spawn("learner", f"learner-{rank}")
        for index in range(self._run.generator.count):
            await self._spawn("generator", f"generator-{index}")

    async def _when_ready(self, service: Service) -> Any:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(service.ready)
        except TimeoutError:
            raise ServiceFailed(
                f"{service.name} was not ready after {START_TIMEOUT_S:.0f} s: see {self._log(service)}"
            ) from None

    async def _spawn(self, role: str, name: str) -> Service:
        ours, theirs = socket.socketpair()
        connect = {"generator": "rollouts", "learner": "training"}.get(role)
        command = [sys.executable, "-m", "async_rl.cli", "serve", role, "--config", str(self._directory.config)]
        command += ["--run-dir", str(self._directory.path), "--name", name]
        command += ["--connect", self._addresses[connect]] if connect else []
        log = self._directory.logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we end the others in order
                env=self._environment(role, name, theirs.fileno()),
            )
        theirs.close()
        service = self._services[name] = Service(role, name, process, ours)
        if self._over.done():
            service.kill()  # the session ended while it was being made
        self._tasks.create_task(self._attend(service), name=name)
        self._tasks.create_task(self._when_ready(service), name=f"{name} ready")
        return service

    def _environment(self, role: str, name: str, descriptor: int) -> Mapping[str, str]:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")  # more threads beside a busy process run slower than one
        environment.setdefault(
            "GLIBC_TUNABLES", ":".join(f"glibc.malloc.{key}={value}" for key, value in MALLOC.items())
        )
        environment.setdefault("HF_HUB_OFFLINE", "1")
        environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
        environment[PIPE_VARIABLE] = str(descriptor)
        if role == "learner" and self._run.learner.ranks > 1:
            rank = name.rpartition("-")[2]
            environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(self._run.learner.ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._rendezvous_port())}
        return environment

    def _rendezvous_port(self) -> int:
        if "rendezvous" not in self._addresses:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._addresses["rendezvous"] = str(probe.getsockname()[1])
        return int(self._addresses["rendezvous"])

    async def _attend(self, service: Service) -> None:
        """Read what it tells until it is gone; then decide what that means."""
        reader, writer = await asyncio.open_connection(sock=service.pipe, limit=1 << 24)
        try:
            while line := await reader.readline():
                event = json.loads(line)
                self._told(service, event["kind"], event["data"])
        except ConnectionResetError:
            pass  # killed with unread bytes in the pipe: the exit status below says the rest
        code = await service.process.wait()
        writer.close()
        self._ended(service, code)

    def _told(self, service: Service, kind: str, data: Any) -> None:
        match kind:
            case "ready":
                service.ready.set_result(data)
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
        if self._stopping:
            if service.role == "controller":
                self._over.set_result(None)
            return
        if self._complete is not None or code == 0:
            return  # told to leave
        self._restarts += 1
        what = f"{service.name} died ({_describe(code)})"
        if self._restarts > MAX_RESTARTS or (code > 0 and not was_ready):
            raise ServiceFailed(f"{what}: see {self._log(service)}")
        self._watch("say", f"{what}: started again")
        if service.role == "controller":
            self._over.set_result(None)
        elif service.role == "learner":
            self._tasks.create_task(self._restart_learner(), name="restart learner")
        else:
            self._tasks.create_task(self._restart(service), name=f"restart {service.name}")

    async def _restart(self, service: Service) -> None:
        await self._spawn(service.role, service.name)

    async def _restart_learner(self) -> None:
        """All ranks: those that are left wait for the dead one in a collective."""
        left = [service for service in self._services.values() if service.role == "learner"]
        for service in left:
            service.replaced = True
            service.kill()
            await service.process.wait()
        self._addresses.pop("rendezvous", None)
        for rank in range(self._run.learner.ranks):
            await self._spawn("learner", f"learner-{rank}")

    async def _leave(self) -> None:
        """The controller is gone: the others have been told, or are killed."""
        loop = asyncio.get_running_loop()
        deadline = END_TIMEOUT_S if self._complete else 0.0 if self._complete is None else 1.0
        timer = loop.call_later(deadline, self._kill_all)
        await asyncio.gather(*(service.process.wait() for service in list(self._services.values())))
        timer.cancel()

    def _stop(self) -> None:
        """Ask for an orderly end; asked twice, or after the time-out, kill."""
        if self._stopping:
            self._kill_all()
            return
        self._stopping = True
        controller = self._services.get("controller")
        if controller is None or not controller.ready.done():
            self._kill_all()
            if not self._over.done():
                self._over.set_result(None)
            return
        self._watch("say", "stopping: the run can be continued with the same command")
        controller.pipe.send(b"stop\n")
        asyncio.get_running_loop().call_later(STOP_TIMEOUT_S, self._kill_all)

    def _kill_all(self) -> None:
        for service in self._services.values():
            service.kill()

    def _log(self, service: Service) -> Path:
        return self._directory.logs / f"{service.name}.log"


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def train(run: Run, directory: RunDirectory, watch: Watch) -> bool:
    """Run to the end. Returns False when it was stopped before; raises UserError, ServiceFailed."""
    return asyncio.run(Supervisor(run, directory, watch).run())
