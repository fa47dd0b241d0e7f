"""The first node of a cluster: it waits for the others and starts services there as if they were its own children.

    node N: Arrive ----> head: lay_out ----> Start, Kill ----> node N: a child per Start; Told, Gone ----> Supervisor

A node that is gone has lost its services; when a node of this rank arrives again they are started there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from aiohttp import WSMsgType, web
from async_rl.launch.link import (
    ADDRESS,
    HEARTBEAT_S,
    JOINS,
    MAX_MESSAGE_BYTES,
    PATH,
    Arrive,
    Gone,
    Kill,
    Over,
    Refused,
    Start,
    Stop,
    ToHead,
    Told,
    ToNode,
)
from async_rl.launch.process import Here, Order
from async_rl.launch.supervisor import LOST, Seat, ServiceFailed, Supervisor, Watch

from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.layout import GPUS, Placed, gpus_of_generator, lay_out
from async_rl.listening import listen
from async_rl.telemetry.files import write_json
from async_rl.telemetry.run_directory import RunDirectory

ARRIVE_TIMEOUT_S = 10.0
"""From the connection to its first message."""
GOODBYE_TIMEOUT_S = 5.0


class RemoteProcess:
    """A service of another node."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name
        self._events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        while (event := await self._events.get()) is not None:
            yield event

    async def wait(self) -> int:
        return await asyncio.shield(self._code)

    def kill(self) -> None:
        if not self._code.done():
            self._node.send(Kill(self._name))

    def told(self, kind: str, data: Any) -> None:
        self._events.put_nowait((kind, data))

    def ended(self, code: int) -> None:
        if not self._code.done():
            self._events.put_nowait(None)
            self._code.set_result(code)


class Node:
    """One other machine, there or not."""

    def __init__(self, title: str, patience_s: float) -> None:
        self.title, self._patience_s = title, patience_s
        """`node 3`"""
        self.arrive: Arrive | None = None
        """What it said when it came."""
        self._outbox: asyncio.Queue[ToNode] | None = None
        """While it is connected."""
        self._there, self.gone = asyncio.Event(), asyncio.Event()
        self._children: dict[str, RemoteProcess] = {}

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    def send(self, message: ToNode) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    async def start(self, order: Order) -> RemoteProcess:
        child = RemoteProcess(self, order.name)
        if self.connected:
            self._children[order.name] = child
            self.send(Start(order))
        else:
            child.ended(LOST)
        return child

    async def present(self, *, needed: bool) -> None:
        try:
            async with asyncio.timeout(self._patience_s if needed else None):
                await self._there.wait()
        except TimeoutError:
            raise ServiceFailed(
                f"{self.title} was not there for {self._patience_s:.0f} s: start it with the same command as this one"
            ) from None

    def came(self, arrive: Arrive) -> asyncio.Queue[ToNode]:
        """What is put into the queue is to be sent to it."""
        self.arrive, self._outbox = arrive, asyncio.Queue()
        self._there.set()
        self.gone.clear()
        return self._outbox

    def heard(self, message: Told | Gone) -> None:
        child = self._children.get(message.name)
        if child is None:
            return
        if isinstance(message, Told):
            child.told(message.kind, message.data)
        else:
            del self._children[message.name]
            child.ended(message.code)

    def lost(self) -> None:
        self._outbox = None
        self._there.clear()
        self.gone.set()
        children, self._children = self._children, {}
        for child in children.values():
            child.ended(LOST)


class Head:
    """The fleet of a cluster (launch.supervisor.Fleet); `async with` serves it.

    Args:
        address: where the other nodes knock, an address of this machine.
        nodes: so many in all.
        start: refuse nodes of another start of this run; empty: of any.
        patience_s: how long a node that is needed is waited for.
    """

    def __init__(
        self,
        run: Run,
        directory: RunDirectory,
        watch: Watch,
        here: Here,
        *,
        address: str,
        port: int,
        key: str,
        nodes: int,
        gpus: Sequence[str],
        learner_machines: int,
        start: str,
        patience_s: float,
    ) -> None:
        self.address, self._port = address, port
        self._run, self._directory, self._watch, self._here = run, directory, watch, here
        self._key, self._gpus, self._start = key, list(gpus), start
        self._learner_machines, self._patience_s = learner_machines, patience_s
        self._nodes = [Node(f"node {rank}", patience_s) for rank in range(1, nodes)]
        self._joined: list[Node] = []
        self._next_generator = run.generator.count
        self._opened = False
        self.supervisor: Supervisor

    async def __aenter__(self) -> Head:
        """Raises UserError: the address is taken, or none of this machine."""
        field = "--head"
        listening = listen(self.address, self._port, field=field, owner="first node", port_field=f"{field}: port")
        app = web.Application()
        app.router.add_get(PATH, self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=GOODBYE_TIMEOUT_S)
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()
        self._url = f"{self.address}:{listening.getsockname()[1]}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        (self._directory.path / ADDRESS).unlink(missing_ok=True)
        await self._runner.cleanup()

    async def seats(self) -> Sequence[Seat]:
        if missing := [node for node in self._nodes if not node.connected]:
            self._watch("say", f"waiting at {self._url} for {len(missing)} more of {len(self._nodes) + 1} nodes")
        await asyncio.gather(*(node.present(needed=True) for node in self._nodes))
        gpus = [self._gpus, *(node.arrive.gpus for node in self._nodes if node.arrive is not None)]
        machines = [self._here, *self._nodes]
        placed = lay_out(self._run, gpus, learner_machines=self._learner_machines)
        return [Seat(one, machines[one.machine]) for one in placed]

    def opened(self) -> None:
        """For those that join: where we are."""
        self._opened = True
        write_json(self._directory.path / ADDRESS, {"head": self._url})

    async def over(self, message: Over) -> None:
        """Tell all nodes, and wait until they have left; not for long."""
        nodes = [node for node in [*self._nodes, *self._joined] if node.connected]
        for node in nodes:
            node.send(message)
        with contextlib.suppress(TimeoutError):  # it will notice that we are gone
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await asyncio.gather(*(node.gone.wait() for node in nodes))

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode(), self._key.encode()):
            return web.Response(status=403)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MAX_MESSAGE_BYTES)
        await socket.prepare(request)
        try:
            async with asyncio.timeout(ARRIVE_TIMEOUT_S):
                arrive = msgspec.json.decode(await socket.receive_str(), type=Arrive)
        except (TimeoutError, TypeError, msgspec.DecodeError):
            await socket.close()
            return socket
        found = self._admit(arrive)
        if isinstance(found, Refused):
            await socket.send_str(msgspec.json.encode(found).decode())
            await socket.close()
            return socket
        await self._attend(found, arrive, socket)
        return socket

    def _admit(self, arrive: Arrive) -> Node | Refused:
        if arrive.rank == JOINS:
            return Node(f"{arrive.hostname}, which joined", self._patience_s)
        if self._start and arrive.start != self._start:
            return Refused(f"it is part of start {arrive.start or '-'}, and the head of {self._start}", again=False)
        if not 1 <= arrive.rank <= len(self._nodes):
            return Refused(f"node ranks go from 0, the head, to {len(self._nodes)}: write --node-rank", again=False)
        node = self._nodes[arrive.rank - 1]
        if node.connected:
            return Refused(f"{node.title} is there already: {node.arrive and node.arrive.hostname}", again=True)
        return node

    async def _attend(self, node: Node, arrive: Arrive, socket: web.WebSocketResponse) -> None:
        outbox = node.came(arrive)
        sending = asyncio.create_task(_send(outbox, socket))
        if node in self._nodes and self._opened:
            self._watch("say", f"{node.title} is back ({arrive.hostname})")
        try:
            if arrive.rank == JOINS:
                self._join(node, arrive)
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    self._heard(node, msgspec.json.decode(message.data, type=ToHead))
        except UserError as error:
            outbox.put_nowait(Refused(str(error), again=False))
            await outbox.join()
        finally:
            sending.cancel()
            self._lost(node)

    def _heard(self, node: Node, message: ToHead) -> None:
        match message:
            case Told() | Gone():
                node.heard(message)
            case Stop(warned) if node in self._nodes:
                self.supervisor.stop(warned=warned)
            case Stop() | Arrive():
                pass

    def _join(self, node: Node, arrive: Arrive) -> None:
        """Raises UserError: what it brings is of no use."""
        seats = [Seat(placed, node) for placed in self._placed(arrive)]
        self._joined.append(node)
        names = ", ".join(seat.placed.name for seat in seats)
        self._watch("say", f"{arrive.hostname} joins with {names}")
        self.supervisor.add(seats)

    def _placed(self, arrive: Arrive) -> list[Placed]:
        run, each = self._run, gpus_of_generator(self._run) if any([self._gpus, arrive.gpus]) else 0
        if run.colocated or run.generator.sglang.attach:
            reason = "placement = 'colocated'" if run.colocated else "generator.sglang.attach"
            raise UserError(f"{reason} in the recipe of the run: no generator can join it")
        fits = len(arrive.gpus) // each if each else max(1, arrive.generators)
        count = arrive.generators or fits
        if count > fits or not count:
            raise UserError(
                f"--generators {count}: each takes a GPU and {arrive.hostname} has {len(arrive.gpus)}; write {fits}"
            )
        placed: list[Placed] = []
        for index in range(count):
            gpus = {GPUS: ",".join(arrive.gpus[index * each : (index + 1) * each])} if each else {}
            placed.append(Placed("generator", f"generator-{self._next_generator}", JOINS, gpus))
            self._next_generator += 1
        return placed

    def _lost(self, node: Node) -> None:
        if node in self._joined:
            self._joined.remove(node)
            self.supervisor.remove(node)
        name = node.arrive.hostname if node.arrive is not None else "?"
        if not self.supervisor.ending and node.connected:
            which = node.title if node in self._nodes else name
            rest = f" ({name}): start it there again to have it back" if node in self._nodes else ", which had joined"
            self._watch("say", f"{which} is gone{rest}")
        node.lost()


async def _send(outbox: asyncio.Queue[ToNode], socket: web.WebSocketResponse) -> None:
    while True:
        message = await outbox.get()
        await socket.send_str(msgspec.json.encode(message).decode())
        outbox.task_done()
