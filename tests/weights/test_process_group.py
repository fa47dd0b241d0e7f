"""Weights by broadcast between real processes: round trips, members that die or hang, new groups, missing members."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore
from weights_cases import LARGE, SMALL, Generator, Outbox, expected_report, holds, packed, writer

from async_rl.models.parameters import Entry, Layout
from async_rl.weights import checksum
from async_rl.weights.distribution import Distribution
from async_rl.weights.errors import GroupIncomplete, GroupSuperseded, WeightsCorrupt, WeightsGone, WeightsMismatch
from async_rl.weights.files import WeightFiles
from async_rl.weights.group import HERE
from async_rl.weights.process_group import ProcessGroupReceiver, ProcessGroupSender
from async_rl.weights.publisher import Publisher
from async_rl.weights.receiver import Receiver
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsId

TIMEOUT_S = 4.0


class Learner:
    """A publisher and what it says."""

    def __init__(self, run: Path, layout: Layout = LARGE, timeout_s: float = TIMEOUT_S) -> None:
        self.outbox, self.layout = Outbox(), layout
        sender = Distribution(WeightFiles(run, layout), group=ProcessGroupSender(layout, timeout_s=timeout_s))
        self.publisher = Publisher(sender, self.outbox.announced.put, self.outbox.failed.put)

    def group(self, epoch: int, *members: str) -> WeightGroup:
        message = WeightGroup(epoch, list(members), self.publisher.store)
        self.publisher.regroup(message)
        return message

    def publish(self, version: int) -> WeightsId:
        weights = WeightsId(1, version)
        self.publisher.publish(weights, writer(self.layout, version))
        return weights


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    made = Learner(tmp_path)
    yield made
    made.publisher.close()


@pytest.fixture
def start() -> Iterator[Callable[[str], Generator]]:
    context = multiprocessing.get_context("spawn")
    started: list[Generator] = []

    def one(name: str) -> Generator:
        started.append(Generator(context, name, TIMEOUT_S))
        return started[-1]

    yield one
    for generator in started:
        if generator.process.is_alive():
            generator.process.kill()
        generator.process.join(20)


def deliver(learner: Learner, generators: list[Generator], version: int) -> None:
    announce = learner.outbox.announcement()
    assert (announce.weights, announce.transport) == (WeightsId(1, version), "process_group")
    for generator in generators:
        generator.send(announce)
    for generator in generators:
        generator.expect(*expected_report(WeightsId(1, version), version))


@pytest.mark.processes
def test_members_come_die_and_come_back(learner: Learner, start: Callable[[str], Generator]) -> None:
    one, two = start("generator-1"), start("generator-2")
    one.expect("up"), two.expect("up")
    group = learner.group(1, "generator-1", "generator-2")
    one.send(group), two.send(group)
    one.expect("formed", 1), two.expect("formed", 1)
    for version in (1, 2):
        learner.publish(version)
        deliver(learner, [one, two], version)

    # SIGKILL of a member: noticed in the next broadcast, reported once, the other one gets an error, not half a model
    assert two.process.pid is not None
    os.kill(two.process.pid, signal.SIGKILL)
    two.process.join(20)
    learner.publish(3)
    one.send(learner.outbox.announcement())
    assert learner.outbox.failure().weights == WeightsId(1, 3)
    one.expect("error", "BroadcastFailed")

    # the survivor under a new epoch
    group = learner.group(2, "generator-1")
    one.send(group)
    one.expect("formed", 2)
    learner.publish(4)
    deliver(learner, [one], 4)

    # a stopped member hangs in TCP: the next group interrupts the broadcast long before any deadline, and the weights
    # travel again by themselves
    three = start("generator-2")
    three.expect("up")
    group = learner.group(3, "generator-1", "generator-2")
    one.send(group), three.send(group)
    one.expect("formed", 3), three.expect("formed", 3)
    learner.publish(5)
    deliver(learner, [one, three], 5)
    assert three.process.pid is not None
    os.kill(three.process.pid, signal.SIGSTOP)
    learner.publish(6)
    one.send(learner.outbox.announcement())
    started = time.monotonic()
    group = learner.group(4, "generator-1")
    one.send(group)
    while (said := one.expect())[0] == "error":
        assert said[1] in ("GroupSuperseded", "BroadcastFailed"), said
    if said[0] == "weights":  # the broadcast got through to the living member before it was interrupted
        one.expect("formed", 4)
    deliver(learner, [one], 6)
    assert time.monotonic() - started < TIMEOUT_S - 1, "waited for the deadline"
    assert one.end() < 2, "a dropped group held up the exit of the process"
    assert learner.publisher.statistics()["failed"] == 1


def receiver(learner: Learner, name: str, layout: Layout = LARGE) -> ProcessGroupReceiver:
    return ProcessGroupReceiver(name, layout, timeout_s=TIMEOUT_S)


def test_round_trip_in_one_process(tmp_path: Path) -> None:
    learner = Learner(tmp_path, SMALL)

    async def main() -> None:
        end = Receiver(SMALL, ProcessGroupReceiver("generator-0", SMALL, timeout_s=TIMEOUT_S))
        await end.regroup(learner.group(7, "generator-0"))
        for version in (1, 2):
            learner.publish(version)
            snapshot = await end.fetch(learner.outbox.announcement())
            assert snapshot.weights == WeightsId(1, version)
            assert holds(snapshot, SMALL, version)
        with pytest.raises(WeightsGone, match="travel in weight group 6, ours is 7"):
            await end.fetch(WeightsAnnounce(WeightsId(1, 3), "process_group", "6"))
        await end.regroup(learner.group(8))
        with pytest.raises(WeightsGone, match="ours is none"):
            await end.fetch(WeightsAnnounce(WeightsId(1, 3), "process_group", "8"))
        end.close()

    asyncio.run(main())
    learner.publisher.close()


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    learner = Learner(tmp_path, SMALL, timeout_s=0.5)
    learner.group(1, "generator-0", "generator-1")
    assert "weight group 1: generator-0, generator-1 did not come within" in learner.outbox.failure().reason
    member = ProcessGroupReceiver("generator-0", SMALL, timeout_s=0.5)
    with pytest.raises(GroupIncomplete, match="weight group 2: learner, generator-1 did not come within"):
        member.form(WeightGroup(2, ["generator-0", "generator-1"], learner.publisher.store))
    learner.publisher.close()
    nobody = WeightGroup(3, ["generator-0"], "127.0.0.1:1")
    with pytest.raises(GroupIncomplete, match="does not answer"):
        member.form(nobody)


@pytest.mark.timeout(60)
def test_a_store_that_is_gone_holds_up_nobody() -> None:
    """Long before the deadline: at once where it refuses; where it says nothing, when a newer group is called."""
    member = ProcessGroupReceiver("generator-0", SMALL, timeout_s=600)
    with pytest.raises(GroupIncomplete, match=r"127\.0\.0\.1:1 does not answer: .*refused"):
        member.form(WeightGroup(1, ["generator-0"], "127.0.0.1:1"))
    with (
        ThreadPoolExecutor(1) as pool,
        socket.create_server(("127.0.0.1", 0), backlog=0) as silent,
        socket.create_connection(silent.getsockname()),  # there is room for one
    ):
        forming = pool.submit(member.form, WeightGroup(2, ["generator-0"], f"127.0.0.1:{silent.getsockname()[1]}"))
        member.interrupt(3)
        with pytest.raises(GroupSuperseded):
            forming.result()


async def superseded(learner: Learner, end: Receiver, waiting: asyncio.Task[None]) -> None:
    """A newer group ends what waits for the older one, and weights arrive in it."""
    newer = asyncio.create_task(end.regroup(learner.group(2, "generator-0")))
    with pytest.raises(GroupSuperseded):
        await waiting
    await newer
    learner.publish(5)
    snapshot = await end.fetch(learner.outbox.announcement())
    assert holds(snapshot, SMALL, 5)
    end.close()


def test_a_newer_group_ends_the_roll_call_of_the_older_one(tmp_path: Path) -> None:
    learner = Learner(tmp_path, SMALL, timeout_s=60)

    async def main() -> None:
        end = Receiver(SMALL, ProcessGroupReceiver("generator-0", SMALL, timeout_s=60))
        waiting = asyncio.create_task(end.regroup(learner.group(1, "generator-0", "never")))
        await asyncio.sleep(0)
        await superseded(learner, end, waiting)

    started = time.monotonic()
    asyncio.run(main())
    learner.publisher.close()
    assert time.monotonic() - started < 20
    assert learner.outbox.failed.empty()


@pytest.mark.timeout(60)
def test_a_newer_group_ends_the_connecting_of_the_older_one(tmp_path: Path) -> None:
    """A member that answers the roll call and is cut off then: gloo alone would wait for it until its deadline."""
    learner = Learner(tmp_path, SMALL, timeout_s=600)

    async def main() -> None:
        end = Receiver(SMALL, ProcessGroupReceiver("generator-0", SMALL, timeout_s=600))
        group = learner.group(1, "generator-0", "cut off")
        waiting = asyncio.create_task(end.regroup(group))
        host, _, port = group.store.rpartition(":")
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        await asyncio.to_thread(store.wait, ["weights/1/1"])
        store.compare_set("weights/1/2", "", HERE)
        await asyncio.to_thread(store.wait, ["weights/1/lane/0/0/0", "weights/1/lane/0/0/1"])  # gloo is on its way
        await superseded(learner, end, waiting)

    asyncio.run(main())
    learner.publisher.close()
    assert learner.outbox.failed.empty()


def test_wrong_checksum_and_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(tmp_path, SMALL)
    other = Layout((Entry("a.weight", (3, 5), torch.float32, 0), Entry("c.weight", (7,), torch.float32, 64)))

    async def main() -> None:
        end = Receiver(SMALL, ProcessGroupReceiver("generator-0", SMALL, timeout_s=TIMEOUT_S))
        stranger = Receiver(other, ProcessGroupReceiver("generator-0", other, timeout_s=TIMEOUT_S))
        await end.regroup(learner.group(1, "generator-0"))
        right = checksum.encode
        monkeypatch.setattr(checksum, "encode", lambda buckets: right(one ^ 1 for one in buckets))
        learner.publish(1)
        with pytest.raises(WeightsCorrupt, match=r"weights 1\.1, bucket 1 of 1: checksum"):
            await end.fetch(learner.outbox.announcement())
        monkeypatch.setattr(checksum, "encode", right)
        await stranger.regroup(learner.group(2, "generator-0"))
        learner.publish(2)
        with pytest.raises(WeightsMismatch, match="must be the same"):
            await stranger.fetch(learner.outbox.announcement())
        end.close()
        stranger.close()

    asyncio.run(main())
    learner.publisher.close()


def test_staging_alternates(tmp_path: Path) -> None:
    """A snapshot stays as it is while the next one arrives."""
    learner = Learner(tmp_path, SMALL)

    async def main() -> None:
        end = Receiver(SMALL, ProcessGroupReceiver("generator-0", SMALL, timeout_s=TIMEOUT_S))
        await end.regroup(learner.group(1, "generator-0"))
        learner.publish(1)
        first = await end.fetch(learner.outbox.announcement())
        learner.publish(2)
        second = await end.fetch(learner.outbox.announcement())
        assert holds(first, SMALL, 1) and holds(second, SMALL, 2)
        end.close()

    asyncio.run(main())
    learner.publisher.close()
    assert packed(SMALL, 1).numel() == SMALL.nbytes
