"""Weights through a file in memory: complete and verified, or a named error; never a leftover."""

from __future__ import annotations

import asyncio
import resource
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from weights_cases import SMALL, Outbox, drafted, holds, packed, writer

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.distribution import Distribution
from async_rl.weights.errors import WeightsCorrupt, WeightsError, WeightsGone, WeightsMismatch
from async_rl.weights.files import Draft, WeightFiles
from async_rl.weights.header import SIZE, Header
from async_rl.weights.places import MEMORY, cleanup, disk_directory, memory_directory
from async_rl.weights.publisher import Publisher
from async_rl.weights.receiver import Receiver
from async_rl.weights.shared_memory import SharedMemoryReceiver
from async_rl.weights.slots import PARTIAL
from async_rl.weights.weight_file import head_bytes
from async_rl.wire.messages import WeightsAnnounce, WeightsId


def sender_of(run: Path, layout: Layout, memory: Path = MEMORY) -> Distribution:
    return Distribution(WeightFiles(run, layout, memory=memory), mapped=True)


def fetch(announce: WeightsAnnounce, layout: Layout) -> Snapshot:
    return SharedMemoryReceiver(layout).fetch(announce)


def sent(sender: Distribution, version: int, seed: int | None = None) -> WeightsAnnounce:
    box: list[WeightsAnnounce] = []
    sender.send(WeightsId(1, version), drafted(sender, packed(SMALL, version if seed is None else seed)), box.append)
    return box[0]


def test_round_trip_by_publisher_and_receiver(tmp_path: Path) -> None:
    outbox = Outbox()
    publisher = Publisher(sender_of(tmp_path, SMALL), outbox.announced.put, outbox.failed.put)
    publisher.publish(WeightsId(3, 8), writer(SMALL, 8))
    announce = outbox.announcement()
    assert (announce.weights, announce.transport, announce.nbytes) == (WeightsId(3, 8), "shared_memory", SMALL.nbytes)
    assert Path(announce.location).parent == memory_directory(tmp_path)
    receiver = Receiver(SMALL)
    snapshot = asyncio.run(receiver.fetch(announce))
    assert snapshot.weights == WeightsId(3, 8)
    assert holds(snapshot, SMALL, 8)
    publisher.close()
    receiver.close()
    assert holds(snapshot, SMALL, 8), "a mapped snapshot outlives its file"
    assert not Path(announce.location).parent.exists()


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    sender = sender_of(tmp_path, SMALL)
    announced = [sent(sender, version) for version in range(4)]
    with pytest.raises(WeightsGone, match=r"weights 1\.0 are gone"):
        fetch(announced[0], SMALL)
    assert holds(fetch(announced[2], SMALL), SMALL, 2)
    assert holds(fetch(announced[3], SMALL), SMALL, 3)
    named = [path.name for path in Path(announced[3].location).parent.iterdir() if not path.name.startswith(PARTIAL)]
    assert sorted(named) == [f"weights-1-{version}.safetensors" for version in (1, 2, 3)], (
        "the first may be overwritten"
    )
    sender.close()


def test_a_receiver_that_lets_go_makes_room_for_the_next_version(tmp_path: Path) -> None:
    sender, receiver = sender_of(tmp_path, SMALL), SharedMemoryReceiver(SMALL)
    files: set[int] = set()
    for version in range(9):
        announce = sent(sender, version)
        assert holds(receiver.fetch(announce), SMALL, version)
        files.add(Path(announce.location).stat().st_ino)
    assert len(files) == 3, "it mapped what it had let go of, and kept that mapping"
    kept = receiver.fetch(announce)
    for version in range(9, 15):
        assert holds(receiver.fetch(sent(sender, version)), SMALL, version)
    assert holds(kept, SMALL, 8), "what is in use is not written"
    sender.close()


def test_the_same_version_again_is_kept(tmp_path: Path) -> None:
    sender = sender_of(tmp_path, SMALL)
    sent(sender, 1)
    for _ in range(3):
        again = sent(sender, 1, seed=5)
    assert holds(fetch(again, SMALL), SMALL, 5)
    sent(sender, 2)  # and in its file no other is written while it is kept
    assert holds(fetch(again, SMALL), SMALL, 5)
    sender.close()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    sender = sender_of(tmp_path, SMALL)
    announce = sent(sender, 1)
    path = Path(announce.location)
    data = bytearray(path.read_bytes())
    start = head_bytes(bytes(data))
    data[start + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsCorrupt, match=r"weights 1\.1: checksum"):
        fetch(announce, SMALL)
    for cut in (start + 1, start - 1, 0):
        path.write_bytes(data[:cut])
        with pytest.raises(WeightsCorrupt):
            fetch(announce, SMALL)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(WeightsCorrupt, match="no weights header"):
        fetch(announce, SMALL)
    sender.close()


def test_other_weights_and_another_model_are_refused(tmp_path: Path) -> None:
    sender = sender_of(tmp_path, SMALL)
    announce = sent(sender, 1)
    with pytest.raises(WeightsMismatch, match=r"weights 1\.2 were announced, the file holds 1\.1"):
        fetch(msgspec.structs.replace(announce, weights=WeightsId(1, 2)), SMALL)
    other = Layout((msgspec_replaced(SMALL), SMALL.entries[1]))
    with pytest.raises(WeightsMismatch, match="the same"):
        fetch(announce, other)
    sender.close()


def msgspec_replaced(layout: Layout) -> object:
    from dataclasses import replace

    return replace(layout.entries[0], name="renamed.weight")


def test_a_view_is_private(tmp_path: Path) -> None:
    sender = sender_of(tmp_path, SMALL)
    announce = sent(sender, 1)
    fetch(announce, SMALL).tensors["a.weight"].zero_()
    assert holds(fetch(announce, SMALL), SMALL, 1)
    sender.close()


def test_without_memory_the_files_are_on_disk(tmp_path: Path) -> None:
    sender = sender_of(tmp_path / "run", SMALL, memory=tmp_path / "missing")
    (tmp_path / "run").mkdir()
    announce = sent(sender, 1)
    assert Path(announce.location).parent == disk_directory(tmp_path / "run")
    assert holds(fetch(announce, SMALL), SMALL, 1)
    sender.close()
    assert not disk_directory(tmp_path / "run").exists()


def test_a_full_memory_falls_back_to_disk(tmp_path: Path) -> None:
    memory, run = tmp_path / "memory", tmp_path / "run"
    memory.mkdir()
    run.mkdir()
    sender = sender_of(run, SMALL, memory=memory)
    directory = memory_directory(run, memory)
    assert directory is not None
    directory.joinpath(f"{PARTIAL}slot-1").mkdir()  # stands for "no space left"
    assert Path(sent(sender, 1).location).parent == disk_directory(run)


def test_nowhere_to_write_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    sender = sender_of(tmp_path / "run", SMALL, memory=tmp_path / "missing")
    with pytest.raises(WeightsError, match="there is no room for the next weights"):
        sent(sender, 1)
    outbox = Outbox()
    publisher = Publisher(sender, outbox.announced.put, outbox.failed.put)
    publisher.publish(WeightsId(1, 2), writer(SMALL, 2))  # training goes on
    assert outbox.failure().weights == WeightsId(1, 2)
    publisher.close()


def test_files_that_somebody_removes_are_made_again(tmp_path: Path) -> None:
    """All of them, while the next weights are on their way into one."""
    sender = sender_of(tmp_path, SMALL)
    for version in range(4):
        sent(sender, version)
    directory = memory_directory(tmp_path)
    assert directory is not None
    draft = drafted(sender, packed(SMALL, 4))
    shutil.rmtree(directory)
    box: list[WeightsAnnounce] = []
    sender.send(WeightsId(1, 4), draft, box.append)
    assert holds(fetch(box[0], SMALL), SMALL, 4)
    for version in range(5, 9):
        assert holds(fetch(sent(sender, version), SMALL), SMALL, version)
    sender.close()
    assert not directory.exists()


def test_weights_that_cannot_be_named_are_refused_however_often_they_are_sent(tmp_path: Path) -> None:
    outbox = Outbox()
    sender = sender_of(tmp_path, SMALL)
    directory = memory_directory(tmp_path)
    assert directory is not None
    (directory / "weights-1-4.safetensors").mkdir()
    draft = drafted(sender, packed(SMALL, 4))
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"weights 1\.4 could not be written: .*Is a directory"):
            sender.send(WeightsId(1, 4), draft, outbox.announced.put)
    assert outbox.announced.empty()
    assert holds(fetch(sent(sender, 5), SMALL), SMALL, 5)
    sender.close()


def test_a_file_that_may_not_be_so_large_is_a_weights_error(tmp_path: Path) -> None:
    """There would be room; what the system says only when it is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = WeightFiles(tmp_path, SMALL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(WeightsError, match=r"there is no room for the next weights: .*File too large"):
            files.draft()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files.close()


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    sent(sender_of(tmp_path, SMALL), 1)
    directory = memory_directory(tmp_path)
    assert directory is not None and list(directory.iterdir())
    sender_of(tmp_path, SMALL)
    assert not directory.exists()
    assert memory_directory(tmp_path) == memory_directory(tmp_path / "x" / "..") != memory_directory(tmp_path / "x")
    cleanup(tmp_path)
    cleanup(tmp_path / "x")
    assert not directory.exists()


class Slow:
    """A transport that is in the middle of a transfer until told otherwise."""

    store = ""

    def __init__(self, run: Path) -> None:
        self._files = WeightFiles(run, SMALL)
        self.draft = self._files.draft
        self.entered, self.proceed = threading.Semaphore(0), threading.Semaphore(0)
        self.arrived: list[tuple[int, torch.Tensor]] = []
        self.files = 0
        """When the last one arrived."""

    def send(self, weights: WeightsId, draft: Draft, announce: object) -> None:
        self.entered.release()
        assert self.proceed.acquire(timeout=20)
        if weights.version == 13:
            raise WeightsError("thirteen")
        self.arrived.append((weights.version, draft.payload.clone()))
        self.files = len(list(draft.slot.path.parent.iterdir()))
        self._files.write(weights, draft)
        self.entered.release()

    def form(self, group: object) -> bool:
        return False

    def interrupt(self, epoch: int) -> None: ...

    def close(self) -> None:
        self._files.close()


def test_only_the_newest_waits_behind_a_transfer(tmp_path: Path) -> None:
    slow, outbox = Slow(tmp_path), Outbox()
    publisher = Publisher(slow, outbox.announced.put, outbox.failed.put)
    publisher.publish(WeightsId(1, 0), writer(SMALL, 0))
    assert slow.entered.acquire(timeout=20)
    for version in (1, 2, 3):  # none of these blocks, and none touches the buffer that travels
        publisher.publish(WeightsId(1, version), writer(SMALL, version))
    for _ in range(2):
        slow.proceed.release()
        assert slow.entered.acquire(timeout=20) and slow.entered.acquire(timeout=20) if len(slow.arrived) < 1 else True
    publisher.close()
    assert [version for version, _ in slow.arrived] == [0, 3]
    for version, payload in slow.arrived:
        assert torch.equal(payload, packed(SMALL, version))
    assert slow.files == 2, "what nobody has seen is overwritten"
    assert publisher.statistics()["coalesced"] == 2


def test_a_failed_transfer_is_reported_and_the_next_one_goes_on(tmp_path: Path) -> None:
    slow, outbox = Slow(tmp_path), Outbox()
    publisher = Publisher(slow, outbox.announced.put, outbox.failed.put)
    slow.proceed.release(2)
    publisher.publish(WeightsId(1, 13), writer(SMALL, 0))
    failure = outbox.failure()
    assert (failure.weights, failure.reason) == (WeightsId(1, 13), "thirteen")
    publisher.publish(WeightsId(1, 14), writer(SMALL, 1))
    for _ in range(3):
        assert slow.entered.acquire(timeout=20)
    publisher.close()
    assert [version for version, _ in slow.arrived] == [14]


def test_header_is_64_bytes_and_round_trips() -> None:
    header = Header.of(WeightsId(2, 9), packed(SMALL, 1), SMALL)
    assert len(header.encode()) == SIZE == 64
    assert Header.decode(header.encode()) == header
