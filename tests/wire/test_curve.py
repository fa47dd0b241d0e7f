"""Streams with keys, over real sockets: who comes in, who does not, and what he is told."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from async_rl.errors import UserError
from async_rl.run_secrets import ClientKeys, Role, RunSecrets, ServerKeys
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.handshake import mechanism
from async_rl.wire.messages import Credit, Heartbeat, Hello, HelloAck
from async_rl.wire.transport import START_AGAIN
from async_rl.wire.zeromq import ZmqClient, ZmqServer, use_keys

Run = Callable[[Any], Any]
HELLO = Hello("generator", "generator-0", 1)


@pytest.fixture
def secrets(tmp_path: Path) -> RunSecrets:
    found = RunSecrets(tmp_path / "secrets")
    found.make()
    return found


@pytest.fixture
def others(tmp_path: Path) -> RunSecrets:
    """Those of another run."""
    found = RunSecrets(tmp_path / "others")
    found.make()
    return found


def listen(keys: ServerKeys | None, *, port: int = 0, role: Role = "generator") -> ZmqServer[Any, Any]:
    stream: Any = rollout_stream() if role == "generator" else training_stream()
    server = ZmqServer(stream, "127.0.0.1", port, role=role, keys=keys)
    server.epoch = 1
    return server


@asynccontextmanager
async def joined(server: ZmqServer[Any, Any], keys: ClientKeys | None) -> AsyncIterator[ZmqClient[Any, Any]]:
    client: ZmqClient[Any, Any] = ZmqClient(rollout_stream().mirror, server.address, keys)
    client.send(HELLO)
    try:
        yield client
    finally:
        await client.close()


async def welcomed(server: ZmqServer[Any, Any], client: ZmqClient[Any, Any]) -> str:
    peer, messages = await server.receive()
    assert messages == [HELLO]
    server.send(peer, HelloAck("w"))
    assert await client.receive() == [HelloAck("w")]
    return peer


async def refused(server: ZmqServer[Any, Any], keys: ClientKeys | None) -> str:
    """What a client is told that sends a Hello; the controller hears nothing of it."""
    hearing = asyncio.ensure_future(server.receive())
    async with joined(server, keys) as client:
        with pytest.raises(UserError) as told:
            await client.receive()
        with pytest.raises(UserError):
            await client.receive()  # and again, whoever asks
    assert not hearing.done()
    hearing.cancel()
    return str(told.value)


def test_the_key_of_the_role_comes_in_again_after_a_restart(real: Run, secrets: RunSecrets) -> None:
    """The controller is another process with the same files; its peers know nothing new."""

    async def main() -> None:
        server = listen(secrets.make())
        port = int(server.address.rpartition(":")[2])
        async with joined(server, secrets.client("generator")) as client:
            assert await mechanism(server.address) == "CURVE"
            first = await welcomed(server, client)
            await server.close()
            server = listen(RunSecrets(secrets.directory).make(), port=port)
            server.epoch = 2
            client.send(Heartbeat())
            hearing = asyncio.ensure_future(server.receive())
            assert await client.receive() == [START_AGAIN]
            hearing.cancel()
            client.send(HELLO)
            assert await welcomed(server, client) == first
            client.send(Credit(3))
            assert (await server.receive())[1] == [Credit(3)]
        await server.close()

    real(main())


def test_who_is_not_let_in_is_told_why(real: Run, secrets: RunSecrets, others: RunSecrets) -> None:
    async def main() -> None:
        ours, theirs = secrets.client("generator"), others.client("generator")
        server = listen(secrets.server())
        told = await refused(server, msgspec.structs.replace(theirs, controller=ours.controller))
        assert told.startswith(f"the controller at {server.address} does not accept {others.directory}/generator.key: ")
        assert "--secrets" in told
        told = await refused(server, theirs)
        assert told.startswith(f"the controller at {server.address} does not know {others.directory}/generator.key: ")
        told = await refused(server, None)
        assert told.startswith(f"the controller at {server.address} asks for keys, and this service uses none: ")
        told = await refused(server, secrets.client("learner"))
        assert "does not accept" in told and "learner.key" in told, "each stream has a key of its own"
        async with joined(server, ours) as client:
            await welcomed(server, client)
        await server.close()
        plain = listen(None)
        told = await refused(plain, ours)
        assert told.startswith(f"the controller at {plain.address} uses no keys, and this service does: ")
        await plain.close()

    real(main())


class Heard(logging.Handler):
    """What the controller's log says, as it says it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(record.getMessage())


def test_the_controller_says_whom_it_did_not_let_in(real: Run, secrets: RunSecrets, others: RunSecrets) -> None:
    log, heard = logging.getLogger("async_rl.wire.gate"), Heard()

    async def main() -> None:
        server = listen(secrets.server(), role="learner")
        ours = secrets.client("learner")
        await refused(server, msgspec.structs.replace(others.client("learner"), controller=ours.controller))
        says = heard.lines.get(timeout=10)
        assert says.startswith("learner stream: did not let in 127.0.0.1, whose key is not of this run")
        await refused(server, others.client("learner"))
        assert heard.lines.get(timeout=10).endswith("a peer that does not know the controller's key, or uses none")
        await server.close()

    log.addHandler(heard)
    try:
        real(main())
    finally:
        log.removeHandler(heard)


def test_nobody_gets_the_answers_to_somebody_else(real: Run, secrets: RunSecrets) -> None:
    """A second connection with the right key and the first one's routing id."""

    async def main() -> None:
        server, keys = listen(secrets.server()), secrets.client("generator")
        async with joined(server, keys) as client:
            peer = await welcomed(server, client)
            context = zmq.asyncio.Context()
            thief = context.socket(zmq.DEALER)
            thief.setsockopt(zmq.ROUTING_ID, bytes.fromhex(peer))
            use_keys(thief, keys)
            events = thief.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED)
            thief.connect(server.address)
            await events.recv_multipart()
            await thief.send(server.codec.mirror.encode(1, [Credit(9)]))
            for number in range(5):
                client.send(Credit(number))
                assert await server.receive() == (peer, [Credit(number)]), "nor is the thief heard"
                server.send(peer, Heartbeat())
                assert await client.receive() == [Heartbeat()], number
            assert not await thief.poll(0)
            events.close(0)
            context.destroy(0)
        await server.close()

    real(main())


def test_a_socket_without_a_controller_behind_it_is_waited_for(real: Run, secrets: RunSecrets) -> None:
    """A tunnel whose other end is not there yet closes what it accepts. That is no wrong key."""

    async def main() -> None:
        closed = asyncio.Semaphore(0)

        async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()
            closed.release()

        tunnel = await asyncio.start_server(close, "127.0.0.1", 0)
        port = tunnel.sockets[0].getsockname()[1]
        assert await mechanism(f"tcp://127.0.0.1:{port}") is None
        client: ZmqClient[Any, Any] = ZmqClient(
            rollout_stream().mirror, f"tcp://127.0.0.1:{port}", secrets.client("generator")
        )
        client.send(HELLO)
        for _ in range(8):
            await closed.acquire()
        tunnel.close()
        await tunnel.wait_closed()
        server = listen(secrets.server(), port=port)
        await welcomed(server, client)
        await client.close()
        await server.close()

    real(main())
