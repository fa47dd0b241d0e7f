"""What one controller carries: rollouts of 20 KB through the real sockets, the real controller and a synced ledger.

    python bench/ledger.py [--seconds 8] [--write] [--profile]

Three arms. The controller has a process of its own; generators and the learner, which do no work, share another.

    throughput   generators answer a lease at once, the learner trains in no time. Every rollout lives its whole life:
                 admitted, a segment (8 KB), a result (20 KB), scored, composed, sent to the learner, trained, deleted.
    latency      a step takes --step-s: rates of a real run. Time from "version live" (the learner sends StepDone) to
                 "admission reopened" (a generator has the first lease of the next step), on one clock.
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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import zmq
import zmq.asyncio

from async_rl import config
from async_rl.controller.controller import Controller
from async_rl.ledger import inspection
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import LmdbStore
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
from async_rl.wire.zeromq import ZmqServer

ROOT = Path(__file__).resolve().parents[1]
TOKENS, SEGMENT_TOKENS, PROMPT_TOKENS = 2560, 1024, 16
"""8 bytes a token: 20 KB a rollout."""
GROUPS, SIZE = 32, 8
STEP_ROLLOUTS = GROUPS * SIZE
CHECKPOINT_EVERY = 4
WARM_UP_S = 2.0


# --- the controller's process ---------------------------------------------------------------------------------


def recipe(steps: int) -> config.Run:
    return config.from_table(
        {
            "steps": steps,
            "model": {"tiny": {"characters": "0123456789"}},
            "environment": {"name": "sorting"},
            "rollout": {"groups_per_step": GROUPS, "group_size": SIZE, "segment_tokens": SEGMENT_TOKENS},
            "staleness": {"max_staleness": 4, "depth": 1},
            "evaluation": {"tasks": 0},
            "controller": {"keep_rollouts": "none"},
        }
    )


def serve(pipe: Connection, directory: Path, profile: bool) -> None:
    profiler = cProfile.Profile() if profile else None
    if profiler is not None:
        profiler.enable()
    asyncio.run(_serve(pipe, directory))
    if profiler is not None:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(45)


async def _serve(pipe: Connection, directory: Path) -> None:
    rollouts = ZmqServer(rollout_stream(), "127.0.0.1", 0)
    training = ZmqServer(training_stream(), "127.0.0.1", 0)
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
            pipe.send((usage.ru_utime + usage.ru_stime, ledger.run.trained))
        else:
            controller.stop()

    loop.add_reader(pipe.fileno(), asked)
    pipe.send((rollouts.address, training.address))
    await controller.run()
    loop.remove_reader(pipe.fileno())
    await ledger.close()
    await rollouts.close()
    await training.close()


# --- the other end --------------------------------------------------------------------------------------------


class Dealer(Client[Any, Any]):
    """As wire.zeromq.ZmqClient, which has an I/O thread of its own: a thousand of them share one here."""

    def __init__(self, context: zmq.asyncio.Context, codec: Codec[Any, Any], address: str) -> None:
        super().__init__(codec)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def _deliver(self, data: bytes) -> None:
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

    def __init__(self, rollouts: str, training: str, *, generators: int, step_s: float) -> None:
        context = zmq.asyncio.Context()
        context.set(zmq.MAX_SOCKETS, 16384)
        codec = rollout_stream().mirror
        self.generators = [Dealer(context, codec, rollouts) for _ in range(generators)]
        self.learner = Dealer(context, training_stream().mirror, training)
        self.step_s = step_s
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
        for client in (*self.generators, self.learner):
            await client.close()

    async def _generate(self, client: Dealer, name: str) -> None:
        client.send(Hello("generator", name, 0))
        client.send(Credit(self.credit))
        weights, ended = WeightsId(0, 0), 0
        beating = asyncio.create_task(self._beat(client))
        while True:
            for message in await client.receive():
                match message:
                    case Lease(groups):
                        if self.done_at:
                            self.reopened.append(time.monotonic() - self.done_at)
                            self.done_at = 0.0
                        for group in groups:
                            self._answer(client, group, weights)
                            ended += len(group.members)
                        client.send(Credit(self.credit + ended))
                    case WeightsAnnounce():
                        weights = message.weights
                        client.send(WeightsLive(weights, 0.0))
                    case Shutdown():
                        beating.cancel()
                        return
                    case _:
                        pass

    def _answer(self, client: Dealer, group: GroupLease, weights: WeightsId) -> None:
        version = weights.version
        for member in group.members:
            span = [VersionSpan(0, SEGMENT_TOKENS, version, version)]
            client.send(Segment(group.group_id, member, 0, 0, 0, SEGMENT_BYTES, SEGMENT_BYTES, span))
        for member in group.members:
            client.send(Finished(group.group_id, "train", [result(member, version)], weights))

    async def _beat(self, client: Dealer) -> None:
        while True:
            await asyncio.sleep(1.0)
            client.send(Heartbeat())

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        self.learner.send(Hello("learner", "learner", 0, weights=WeightsId(0, 0)))
        while True:
            for message in await self.learner.receive():
                match message:
                    case HelloAck():
                        self.learner.send(WeightsAnnounce(WeightsId(0, 0), "shared_memory"))
                        self.learner.send(BatchRequest(0))
                    case MicroBatches():
                        tasks.create_task(self._step(message.step))
                    case Shutdown():
                        self.learner.send(CheckpointSaved(self.version, ""))
                        await asyncio.sleep(0.1)
                        return
                    case _:
                        pass

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


def measure(*, generators: int, step_s: float, seconds: float, profile: bool = False) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "ledger"
        ours, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        controller = spawn.Process(target=serve, args=(theirs, directory, profile))
        controller.start()
        rollouts, training = ours.recv()
        peers = Peers(rollouts, training, generators=generators, step_s=step_s)

        def reading() -> tuple[float, float, int]:
            ours.send("cpu")
            cpu_s, trained = ours.recv()
            return time.monotonic(), cpu_s, trained

        async def main() -> tuple[tuple[float, float, int], tuple[float, float, int]]:
            running = asyncio.create_task(peers.run())
            await asyncio.sleep(WARM_UP_S)
            before = await asyncio.to_thread(reading)
            peers.reopened.clear()
            await asyncio.sleep(seconds)
            after = await asyncio.to_thread(reading)
            latencies.extend(peers.reopened)
            ours.send("stop")
            await running
            return before, after

        latencies: list[float] = []
        before, after = asyncio.run(main())
        controller.join()
        report = inspection.inspect(directory, max_staleness=4)
        assert inspection.holds(report), report
    wall_s, cpu_s, trained = (b - a for a, b in zip(before, after, strict=True))
    spread = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "generators": generators,
        "rollouts_per_s": trained / wall_s,
        "rollouts_per_cpu_s": trained / cpu_s,
        "controller_cores": cpu_s / wall_s,
        "steps": len(latencies),
        "reopened_p50_ms": spread[49] * 1e3,
        "reopened_p99_ms": spread[98] * 1e3,
        "reopened_max_ms": max(latencies) * 1e3,
    }


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


def raw(seconds: float, rollouts: int) -> float:
    """Rollouts a second."""
    with tempfile.TemporaryDirectory() as scratch, lmdb.open(scratch, map_size=8 << 30, readahead=False) as env:
        source, began, commits = batches(rollouts), time.monotonic(), 0
        while time.monotonic() - began < seconds:
            for writes, deletes in (next(source), next(source), next(source)):
                with env.begin(write=True) as transaction:
                    for key, value in writes.items():
                        transaction.put(key, value)
                    for key in deletes:
                        transaction.delete(key)
            commits += 1
        return commits * rollouts / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--step-s", type=float, default=0.25, help="of the latency arms: 1000 rollouts a second")
    parser.add_argument("--only", choices=("throughput", "latency", "connections"))
    parser.add_argument("--profile", action="store_true", help="of the controller's loop, on stderr")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    arms = {"throughput": (8, 0.0), "latency": (8, options.step_s), "connections": (1000, options.step_s)}
    figures: dict[str, Any] = {"rollout_kb": 8 * TOKENS / 1024, "segment_kb": 8 * SEGMENT_TOKENS / 1024}
    for name, (generators, step_s) in arms.items():
        if options.only in (None, name):
            found = measure(generators=generators, step_s=step_s, seconds=options.seconds, profile=options.profile)
            figures[name] = found
            print(
                f"{name:<12} {generators:5d} generators  {found['rollouts_per_s']:7.0f} rollouts/s"
                f"  {found['rollouts_per_cpu_s']:7.0f} per CPU-s of the controller"
                f"  reopened p50 {found['reopened_p50_ms']:.2f} p99 {found['reopened_p99_ms']:.2f} ms"
                f" ({found['steps']} steps)",
                flush=True,
            )
    if options.only in (None, "throughput"):
        figures["raw_lmdb"] = {str(size): raw(options.seconds / 2, size) for size in (16, 64, 256)}
        for size, rate in figures["raw_lmdb"].items():
            print(f"raw LMDB, {size:>3} rollouts a transaction: {rate:7.0f} rollouts/s")
        figures["share_of_raw_lmdb"] = figures["throughput"]["rollouts_per_s"] / figures["raw_lmdb"]["64"]
        print(f"throughput / raw LMDB at 64: {figures['share_of_raw_lmdb']:.2f}")
    if options.write:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        stamp = {"date": date.today().isoformat(), "commit": commit.stdout.strip(), "device": device}
        path = ROOT / "bench" / "results" / "ledger.json"
        path.write_text(json.dumps(stamp | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
