"""What one controller carries: rollouts of 20 KB through the real sockets, the real controller and a synced ledger.

    python bench/ledger.py [--seconds 8] [--write] [--profile]

Four arms. The controller has a process of its own; generators and the learner, which do no work, share another.

    throughput   generators answer a lease at once, the learner trains in no time. Every rollout lives its whole life:
                 admitted, a segment (8 KB), a result (20 KB), scored, composed, sent to the learner, trained, deleted.
    keys         the same over CURVE, as beyond loopback.
    latency      1000 rollouts a second, as in a real run: a step takes --step-s, rollouts end one by one. From "version
                 live" to "admission reopened": inside the controller (it has read StepDone; the first lease is with
                 the socket) and from end to end (the learner sent StepDone; a generator has the lease).
    connections  the same with 1000 generators.

Beside the first: the same bytes under the same keys written to and deleted from LMDB, in batches of one synced
transaction each, by one thread and nothing else: what the disk and LMDB allow.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import platform
import pstats
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import zmq
import zmq.asyncio
from async_rl.launch.child import settle_heap
from stamp import commit

from async_rl import config, recipes
from async_rl.controller.controller import Controller
from async_rl.ledger import inspection
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import LmdbStore
from async_rl.run_secrets import ClientKeys, RunSecrets, ServerKeys
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.wire.codec import Codec, rollout_stream, training_stream
from async_rl.wire.messages import (
    Activity,
    BatchRequest,
    CheckpointSaved,
    Credit,
    Finished,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    Lease,
    MicroBatches,
    RolloutResult,
    Segment,
    Sequence,
    Shutdown,
    StepDone,
    VersionSpan,
    WeightsAnnounce,
    WeightsId,
    WeightsLive,
)
from async_rl.wire.transport import Client
from async_rl.wire.zeromq import ZmqServer, use_keys

ROOT = Path(__file__).resolve().parents[1]
TOKENS, SEGMENT_TOKENS, PROMPT_TOKENS = 2560, 1024, 16
"""8 bytes a token: 20 KB a rollout."""
GROUPS, SIZE = 64, 8
"""The steps of the reference cluster."""
STEP_ROLLOUTS = GROUPS * SIZE
CHECKPOINT_EVERY = 4
WARM_UP_S = 2.0


# --- the controller's process ---------------------------------------------------------------------------------


def recipe(steps: int) -> config.Run:
    return recipes.from_table(
        {
            "steps": steps,
            "model": {"tiny": {"characters": "0123456789"}},
            "environment": {"name": "sorting"},
            "rollout": {"groups_per_step": GROUPS, "group_size": SIZE, "segment_tokens": SEGMENT_TOKENS},
            "staleness": {"max_staleness": 4, "depth": 4},
            "evaluation": {"tasks": 0},
            "learner": {"microbatch_tokens": 25 * TOKENS},
            "controller": {"keep_rollouts": "none"},
        }
    )


def serve(pipe: Connection, directory: Path, keys: ServerKeys | None, profile: bool) -> None:
    profiler = cProfile.Profile() if profile else None
    if profiler is not None:
        profiler.enable()
    asyncio.run(_serve(pipe, directory, keys))
    if profiler is not None:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(45)


class Timed:
    """Seconds from a StepDone that was read to the first lease that is with the socket: by the clock, and those in
    which the controller's loop had a core (on a machine of its own the two are one)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.done_at = self.cpu_at = 0.0
        self.leased = False

    def done(self) -> None:
        self.done_at, self.cpu_at, self.leased = time.monotonic(), time.thread_time(), False

    def sent(self) -> None:
        if self.leased and self.done_at:
            self.seconds.append(time.monotonic() - self.done_at)
            self.cpu_seconds.append(time.thread_time() - self.cpu_at)
            self.done_at = 0.0

    def read(self) -> tuple[list[float], list[float]]:
        found = self.seconds, self.cpu_seconds
        self.seconds, self.cpu_seconds = [], []
        return found


class TimedTraining(ZmqServer[Any, Any]):
    timed: Timed

    async def receive(self) -> tuple[str, list[Any]]:
        peer, messages = await super().receive()
        if any(isinstance(message, StepDone) for message in messages):
            self.timed.done()
        return peer, messages


class TimedRollouts(ZmqServer[Any, Any]):
    timed: Timed

    def send(self, peer: str, message: Any) -> None:
        self.timed.leased |= isinstance(message, Lease)
        super().send(peer, message)

    def _deliver(self, peer: str, data: bytes) -> None:
        super()._deliver(peer, data)
        self.timed.sent()


async def _serve(pipe: Connection, directory: Path, keys: ServerKeys | None) -> None:
    rollouts = TimedRollouts(rollout_stream(), "127.0.0.1", 0, role="generator", keys=keys)
    training = TimedTraining(training_stream(), "127.0.0.1", 0, role="learner", keys=keys)
    rollouts.timed = training.timed = timed = Timed()
    ledger = await Ledger.open(LmdbStore(directory))
    controller = Controller(
        recipe(1_000_000),
        ledger=ledger,
        tasks=NumberedTasks(),
        rollouts=rollouts,
        training=training,
        journal=MemoryJournal(),
    )
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if pipe.recv() == "cpu":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send((usage.ru_utime + usage.ru_stime, ledger.run.trained, *timed.read()))
        else:
            controller.stop()

    loop.add_reader(pipe.fileno(), asked)
    settle_heap()
    pipe.send((rollouts.address, training.address))
    await controller.run()
    loop.remove_reader(pipe.fileno())
    await ledger.close()
    await rollouts.close()
    await training.close()


# --- the other end --------------------------------------------------------------------------------------------


class Dealer(Client[Any, Any]):
    """As wire.zeromq.ZmqClient, which has an I/O thread of its own: a thousand of them share one here."""

    def __init__(
        self, context: zmq.asyncio.Context, codec: Codec[Any, Any], address: str, keys: ClientKeys | None
    ) -> None:
        super().__init__(codec)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            use_keys(self._socket, keys)
        self._socket.connect(address)

    def _deliver(self, data: bytes) -> None:
        if not self._socket.closed:
            self._socket.send(data)

    async def _next(self) -> bytes:
        return await self._socket.recv()

    async def close(self) -> None:
        self._socket.close()


def result(member: int, version: int) -> RolloutResult:
    span = VersionSpan(PROMPT_TOKENS, TOKENS, version, version)
    return RolloutResult(member, [Sequence(TOKEN_BYTES, TOKEN_BYTES, [span])], member / SIZE)


TOKEN_BYTES = bytes(4 * TOKENS)
SEGMENT_BYTES = bytes(4 * SEGMENT_TOKENS)


class Peers:
    """Generators and the learner."""

    def __init__(
        self, rollouts: str, training: str, secrets: RunSecrets | None, *, generators: int, step_s: float
    ) -> None:
        context = zmq.asyncio.Context()
        context.set(zmq.MAX_SOCKETS, 16384)
        codec = rollout_stream().mirror
        keys = None if secrets is None else secrets.client("generator")
        self.generators = [Dealer(context, codec, rollouts, keys) for _ in range(generators)]
        keys = None if secrets is None else secrets.client("learner")
        self.learner = Dealer(context, training_stream().mirror, training, keys)
        self.step_s = step_s
        self.random = random.Random(1)
        self.over = False
        self.version = 0
        self.done_at = 0.0
        """When the newest version went live; 0 once its first lease came."""
        self.reopened: list[float] = []
        """[steps] seconds"""
        self.credit = max(SIZE, 4 * STEP_ROLLOUTS // generators)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number, client in enumerate(self.generators):
                tasks.create_task(self._generate(client, f"generator-{number}"))
            tasks.create_task(self._learn(tasks))
        self.over = True
        for client in (*self.generators, self.learner):
            await client.close()

    async def _generate(self, client: Dealer, name: str) -> None:
        client.send(Hello("generator", name, 0))
        client.send(Credit(self.credit))
        weights, ended = WeightsId(0, 0), 0
        loop = asyncio.get_running_loop()

        def answer(group: GroupLease, member: int) -> None:
            nonlocal ended
            if self.over:
                return
            ended += 1
            span = VersionSpan(0, SEGMENT_TOKENS, weights.version, weights.version)
            client.send(Segment(group.group_id, member, 0, 0, 0, SEGMENT_BYTES, SEGMENT_BYTES, [span]))
            client.send(Finished(group.group_id, "train", [result(member, weights.version)], weights))
            client.send(Credit(self.credit + ended))

        beating = asyncio.create_task(self._beat(client))
        while True:
            for message in await client.receive():
                match message:
                    case Lease(groups):
                        if self.done_at:
                            self.reopened.append(time.monotonic() - self.done_at)
                            self.done_at = 0.0
                        for group in groups:
                            for member in group.members:
                                delay = self.random.uniform(0, 2 * self.step_s)
                                if delay:
                                    loop.call_later(delay, answer, group, member)
                                else:
                                    answer(group, member)
                    case WeightsAnnounce():
                        weights = message.weights
                        client.send(WeightsLive(weights, 0.0))
                    case Shutdown():
                        beating.cancel()
                        return
                    case _:
                        pass

    async def _beat(self, client: Dealer) -> None:
        while True:
            await asyncio.sleep(1.0)
            client.send(Heartbeat())

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        self.learner.send(Hello("learner", "learner", 0, weights=WeightsId(0, 0)))
        steps: asyncio.Queue[int] = asyncio.Queue()
        training = tasks.create_task(self._train(steps))
        while True:
            for message in await self.learner.receive():
                match message:
                    case HelloAck():
                        self.learner.send(WeightsAnnounce(WeightsId(0, 0), "shared_memory"))
                        self.learner.send(BatchRequest(0))
                    case MicroBatches():
                        steps.put_nowait(message.step)
                    case Shutdown():
                        training.cancel()
                        self.learner.send(CheckpointSaved(self.version, ""))
                        await asyncio.sleep(0.1)
                        return
                    case _:
                        pass

    async def _train(self, steps: asyncio.Queue[int]) -> None:
        while True:
            await self._step(await steps.get())

    async def _step(self, step: int) -> None:
        self.learner.send(BatchRequest(step + 1))
        if self.step_s:
            await asyncio.sleep(self.step_s)
        self.version = step + 1
        weights = WeightsId(0, self.version)
        self.done_at = time.monotonic()
        now = asyncio.get_running_loop().time()
        self.learner.send(StepDone(step, weights, {"reward": 0.0, "samples": 1.0}, Activity(now, {}, 0.0)))
        self.learner.send(WeightsAnnounce(weights, "shared_memory"))
        if self.version % CHECKPOINT_EVERY == 0:
            self.learner.send(CheckpointSaved(self.version, ""))


class Reading(NamedTuple):
    at: float
    cpu_s: float
    trained: int
    reopened: list[float]
    reopened_cpu: list[float]


def measure(
    *, generators: int, step_s: float, seconds: float, curve: bool = False, profile: bool = False
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "ledger"
        secrets = RunSecrets(Path(scratch) / "secrets") if curve else None
        keys = None if secrets is None else secrets.make()
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        controller = spawn.Process(target=serve, args=(theirs, directory, keys, profile))
        controller.start()
        rollouts, training = ours.recv()
        peers = Peers(rollouts, training, secrets, generators=generators, step_s=step_s)

        def reading() -> Reading:
            ours.send("cpu")
            return Reading(time.monotonic(), *ours.recv())

        async def main() -> tuple[Reading, Reading, list[float]]:
            running = asyncio.create_task(peers.run())
            await asyncio.sleep(WARM_UP_S)
            before = await asyncio.to_thread(reading)
            peers.reopened.clear()
            await asyncio.sleep(seconds)
            after, reopened = await asyncio.to_thread(reading), list(peers.reopened)
            ours.send("stop")
            await running
            return before, after, reopened

        before, after, end_to_end = asyncio.run(main())
        controller.join()
        report = inspection.inspect(directory, max_staleness=4)
        assert inspection.holds(report), report
    wall_s, cpu_s, trained = after.at - before.at, after.cpu_s - before.cpu_s, after.trained - before.trained
    return {
        "generators": generators,
        "rollouts_per_s": trained / wall_s,
        "rollouts_per_cpu_s": trained / cpu_s,
        "controller_cores": cpu_s / wall_s,
        "reopened_in_controller_ms": quantiles(after.reopened),
        "reopened_in_controller_cpu_ms": quantiles(after.reopened_cpu),
        "reopened_end_to_end_ms": quantiles(end_to_end),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"count": len(seconds)}
    found = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"count": len(seconds), "p50": found[49] * 1e3, "p99": found[98] * 1e3, "max": max(seconds) * 1e3}


# --- LMDB alone -----------------------------------------------------------------------------------------------


def batches(rollouts: int) -> Iterator[tuple[dict[bytes, bytes], list[bytes]]]:
    """(writes, deletes) of so many rollouts: as the ledger's, with one transaction for what lives and one for what
    ends."""
    segment, payload, small = bytes(8 * SEGMENT_TOKENS), bytes(8 * TOKENS), bytes(80)
    first = 0
    while True:
        members = [(number // SIZE, number % SIZE) for number in range(first, first + rollouts)]
        segments = {b"segment/%016x/%04x/0000/00000000" % at: segment for at in members}
        groups = {b"group/%016x" % group: small for group, _ in members}
        tasks = {b"task/%016x" % group: small for group, _ in members}
        yield segments | groups | tasks, []
        payloads = {b"payload/%016x/%04x" % at: payload for at in members}
        yield payloads | groups, list(segments)
        events = {b"event/%016x" % group: small for group, _ in members}
        yield events, [*payloads, *groups, *tasks]
        first += rollouts


def raw(seconds: float, rollouts: int) -> tuple[float, float]:
    """Rollouts a second, and a CPU-second."""
    with tempfile.TemporaryDirectory() as scratch, lmdb.open(scratch, map_size=8 << 30, readahead=False) as env:
        source, began, cpu, commits = batches(rollouts), time.monotonic(), time.process_time(), 0
        while time.monotonic() - began < seconds:
            for writes, deletes in (next(source), next(source), next(source)):
                with env.begin(write=True) as transaction:
                    for key, value in writes.items():
                        transaction.put(key, value)
                    for key in deletes:
                        transaction.delete(key)
            commits += 1
        done = commits * rollouts
        return done / (time.monotonic() - began), done / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--step-s", type=float, default=0.25, help="of the latency arms: 1000 rollouts a second")
    parser.add_argument("--only", choices=("throughput", "keys", "latency", "connections"))
    parser.add_argument("--profile", action="store_true", help="of the controller's loop, on stderr")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    arms = {"throughput": (8, 0.0), "keys": (8, 0.0)}
    arms |= {"latency": (8, options.step_s), "connections": (1000, options.step_s)}
    figures: dict[str, Any] = {"rollout_kb": 8 * TOKENS / 1024, "segment_kb": 8 * SEGMENT_TOKENS / 1024}
    for name, (generators, step_s) in arms.items():
        if options.only in (None, name):
            seconds, curve = options.seconds, name == "keys"
            found = measure(generators=generators, step_s=step_s, seconds=seconds, curve=curve, profile=options.profile)
            figures[name] = found
            print(
                f"{name:<12} {generators:5d} generators  {found['rollouts_per_s']:7.0f} rollouts/s"
                f"  {found['rollouts_per_cpu_s']:7.0f} per CPU-s of the controller"
            )
            for where in ("in_controller", "in_controller_cpu", "end_to_end"):
                reopened = found[f"reopened_{where}_ms"].items()
                print(f"    reopened {where:<18}" + "  ".join(f"{key} {value:.1f}" for key, value in reopened))
    if options.only is None:
        figures["share_with_keys"] = figures["keys"]["rollouts_per_s"] / figures["throughput"]["rollouts_per_s"]
        print(f"with keys / without: {figures['share_with_keys']:.2f}")
    if options.only in (None, "throughput"):
        figures["raw_lmdb"] = {}
        for size in (16, 64, 256):
            rate, cpu_rate = raw(options.seconds / 2, size)
            figures["raw_lmdb"][str(size)] = {"rollouts_per_s": rate, "rollouts_per_cpu_s": cpu_rate}
            print(f"raw LMDB, {size:>3} rollouts a transaction: {rate:7.0f} rollouts/s  {cpu_rate:7.0f} per CPU-s")
        ratio = figures["throughput"]["rollouts_per_s"] / figures["raw_lmdb"]["64"]["rollouts_per_s"]
        figures["share_of_raw_lmdb"] = ratio
        print(f"throughput / raw LMDB with 64: {ratio:.2f}")
    if options.write:
        device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        path = ROOT / "bench" / "results" / "ledger.json"
        path.write_text(json.dumps(stamp | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
