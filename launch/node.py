"""A node of a cluster but the first: it knocks at the head (launch.head), starts what the head wants here, and ends it
all when the head says so or is gone. Then it knocks again, so that a head that is started again finds its nodes.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import aiohttp
import msgspec
from async_rl.launch.interface import sockets_of
from async_rl.launch.link import (
    HEARTBEAT_S,
    JOINS,
    KEY,
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
    key_of,
)
from async_rl.launch.process import Here, Process
from async_rl.launch.supervisor import STOP_TIMEOUT_S, ServiceFailed

from async_rl.errors import AsyncRLError, UserError
from async_rl.exit_codes import EXIT_AGAIN, EXIT_STOPPED
from async_rl.telemetry.run_directory import RunDirectory

KNOCK_S = 1.0
"""Between two knocks at a head that is not there: nothing tells us when a machine elsewhere begins to listen."""


class Ended(Exception):
    """This node has nothing more to do."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Worker:
    """`await run()` returns the exit code.

    Args:
        locate: where the head is, as HOST:PORT; asked again before every knock. None: nobody knows yet.
        patience_s: how long the head may be away.

    Raises:
        ServiceFailed: the head was away for longer. UserError: it will not have us.
    """

    def __init__(
        self,
        directory: RunDirectory,
        arrive: Arrive,
        locate: Callable[[], str | None],
        *,
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._directory, self._arrive, self._locate = directory, arrive, locate
        self._patience_s, self._say = patience_s, say
        self._children: dict[str, Process] = {}
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        """While we are connected."""
        self._stopping: asyncio.Future[None]

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._stopping = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            loop.add_signal_handler(number, self._interrupted, number)
        try:
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key_of(self._directory)}"}) as session:
                while True:
                    await self._serve(await self._knock(session))
        except Ended as end:
            return end.code

    # --- the head ---------------------------------------------------------------------------------------------

    async def _knock(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        """Until the head answers."""
        loop, place = asyncio.get_running_loop(), None
        deadline, said = loop.time() + self._patience_s, False
        while True:
            place = self._locate() or place
            reason = "it has not said where it is"
            if place is not None:
                try:
                    return await session.ws_connect(
                        f"ws://{place}{PATH}", heartbeat=HEARTBEAT_S, max_msg_size=MAX_MESSAGE_BYTES
                    )
                except aiohttp.WSServerHandshakeError as error:
                    if error.status == 403:
                        raise UserError(
                            f"the head at {place} has another {self._directory.path / KEY}: write a --run-dir that "
                            "all nodes share"
                        ) from None
                    reason = str(error)
                except (aiohttp.ClientError, OSError) as error:
                    reason = str(error)
            if loop.time() > deadline:
                where = place or self._directory.path
                raise ServiceFailed(f"the head at {where} did not answer for {self._patience_s:.0f} s: {reason}")
            if not said:
                self._say(f"waiting for the head at {place or self._directory.path}")
                said = True
            await asyncio.wait({self._stopping}, timeout=KNOCK_S)
            if self._stopping.done():
                raise Ended(EXIT_STOPPED)

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Until the connection ends; nothing is left running here then."""
        self._socket = socket
        await self._send(self._arrive)
        host = socket.get_extra_info("sockname")[0]
        here = Here(self._directory, sockets_of(host))
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        order = msgspec.json.decode(message.data, type=ToNode)
                        await self._obey(order, here, tasks)
                self._kill_all()
        except* (Ended, AsyncRLError) as group:
            self._kill_all()
            raise group.exceptions[0] from None
        finally:
            self._socket = None
            await socket.close()
        if self._stopping.done():
            raise Ended(EXIT_STOPPED)
        self._say("the head is gone")

    async def _obey(self, message: ToNode, here: Here, tasks: asyncio.TaskGroup) -> None:
        match message:
            case Start(order):
                if not self._directory.config.exists():
                    raise UserError(f"{self._directory.config} is not here: write a --run-dir that all nodes share")
                self._say(f"starting {order.name}")
                child = self._children[order.name] = await here.start(order)
                tasks.create_task(self._attend(order.name, child), name=order.name)
            case Kill(name):
                if name in self._children:
                    self._children[name].kill()
            case Refused(reason, again):
                if not again:
                    raise UserError(reason)
                self._say(reason)
                await asyncio.wait({self._stopping}, timeout=KNOCK_S)
            case Over(code, reason):
                self._kill_all()
                await asyncio.gather(*(child.wait() for child in self._children.values()))
                if code == EXIT_AGAIN and self._arrive.rank == JOINS:
                    self._say("the run stops, and will be started again")
                    return  # the head closes the connection, and we knock until it is there again
                if reason:
                    self._say(reason)
                raise Ended(code)

    async def _attend(self, name: str, child: Process) -> None:
        """Until it is gone."""
        async for kind, data in child.events():
            await self._send(Told(name, kind, data))
        code = await child.wait()
        del self._children[name]
        await self._send(Gone(name, code))

    async def _send(self, message: ToHead) -> None:
        """Nothing where the connection is gone: whoever reads it will notice."""
        if self._socket is None or self._socket.closed:
            return
        try:
            await self._socket.send_str(msgspec.json.encode(message).decode())
        except (aiohttp.ClientError, ConnectionError):
            return

    # --- the end ----------------------------------------------------------------------------------------------

    def _interrupted(self, number: signal.Signals) -> None:
        """The head decides what becomes of the run; who has joined leaves it at once, and who is told twice, too."""
        loop = asyncio.get_running_loop()
        if self._stopping.done():
            self._leave()
            return
        if number != signal.SIGUSR1 or self._arrive.rank == JOINS:
            self._stopping.set_result(None)
        if self._arrive.rank == JOINS:
            self._leave()
            return
        self._goodbye = loop.create_task(self._send(Stop(warned=number == signal.SIGUSR1)))
        if number != signal.SIGUSR1:
            loop.call_later(STOP_TIMEOUT_S, self._leave)

    def _leave(self) -> None:
        self._kill_all()
        if self._socket is not None:
            self._closing = asyncio.get_running_loop().create_task(self._socket.close())

    def _kill_all(self) -> None:
        for child in self._children.values():
            child.kill()
