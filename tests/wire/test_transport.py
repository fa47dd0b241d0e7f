"""Both transports behave the same: order, epochs, frames of at most sixteen messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from async_rl.errors import UserError
from async_rl.wire.codec import rollout_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import Credit, Heartbeat, Hello, HelloAck, Shutdown
from async_rl.wire.transport import START_AGAIN
from async_rl.wire.zeromq import ZmqClient, ZmqServer

Run = Callable[[Any], Any]


def make_pair(kind: str) -> tuple[Any, Any]:
    if kind == "memory":
        server: Any = MemoryServer(rollout_stream())
        return server, server.connect()
    server = ZmqServer(rollout_stream(), "127.0.0.1", 0)
    return server, ZmqClient(rollout_stream().mirror, server.address)


@pytest.mark.parametrize("kind", ["memory", "zmq"])
def test_messages_arrive_in_order_in_bounded_frames(kind: str, real: Run) -> None:
    async def main() -> None:
        server, client = make_pair(kind)
        server.epoch = 4
        client.send(Hello("generator", "generator-0", 1))
        for limit in range(40):
            client.send(Credit(limit))
        peer, messages = await server.receive()
        assert isinstance(messages[0], Hello) and len(messages) == 16
        server.send(peer, HelloAck("w"))
        assert await client.receive() == [HelloAck("w")]
        assert client.epoch == 4
        client.send(Credit(100))
        _, messages = await server.receive()
        assert messages == [Credit(100)], "frames from before the welcome carry epoch 0 and are refused"
        assert server.refused == 2
        await client.close()
        await server.close()

    real(main())


@pytest.mark.parametrize("kind", ["memory", "zmq"])
def test_frames_of_an_older_epoch_are_refused_by_the_client(kind: str, real: Run) -> None:
    async def main() -> None:
        server, client = make_pair(kind)
        server.epoch = 2
        client.send(Hello("generator", "generator-0", 1))
        peer, _ = await server.receive()
        server.send(peer, HelloAck("w"))
        await client.receive()
        server.epoch = 1
        server.send(peer, Shutdown("from the past"))
        await asyncio.sleep(0)
        server.epoch = 2
        server.send(peer, Heartbeat())
        assert await client.receive() == [Heartbeat()]
        await client.close()
        await server.close()

    real(main())


@pytest.mark.parametrize("kind", ["memory", "zmq"])
def test_who_is_of_an_older_epoch_is_told_to_start_again(kind: str, real: Run) -> None:
    async def main() -> None:
        server, client = make_pair(kind)
        server.epoch = 1
        client.send(Hello("generator", "generator-0", 1))
        peer, _ = await server.receive()
        server.send(peer, HelloAck("w"))
        await client.receive()
        server.epoch = 2
        client.send(Heartbeat())
        hearing = asyncio.ensure_future(server.receive())
        assert await client.receive() == [START_AGAIN] and START_AGAIN.restart
        client.send(Hello("generator", "generator-0", 2))
        assert (await hearing)[1] == [Hello("generator", "generator-0", 2)] and server.refused == 1
        server.epoch = 0
        client.send(Heartbeat())  # of a newer epoch: this controller is the one that is gone
        await asyncio.sleep(0)  # a frame of its own
        client.send(Hello("generator", "generator-0", 3))
        assert (await server.receive())[1] == [Hello("generator", "generator-0", 3)] and server.refused == 2
        server.epoch = 1
        server.send(peer, Heartbeat())
        assert await client.receive() == [Heartbeat()], "and nothing before it"
        await client.close()
        await server.close()

    real(main())


def test_bytes_that_are_no_frame_do_not_stop_the_server(real: Run) -> None:
    async def main() -> None:
        server, client = make_pair("zmq")
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.connect(server.address)
        stranger.send(b"\xc1 not msgpack")
        stranger.send_multipart([b"two", b"frames"])
        client.send(Hello("generator", "generator-0", 1))
        while server.refused < 2:  # the stranger's frames may come before or after the client's
            receiving = asyncio.ensure_future(server.receive())
            await asyncio.wait({receiving}, timeout=1)
            if not receiving.done():
                receiving.cancel()
        stranger.close(0)
        await client.close()
        await server.close()

    real(main())


def test_a_taken_port_is_named(real: Run) -> None:
    async def main() -> None:
        first = ZmqServer(rollout_stream(), "127.0.0.1", 0)
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(UserError, match=f"controller.port = {port}.*free port"):
            ZmqServer(rollout_stream(), "127.0.0.1", port)
        await first.close()

    real(main())
