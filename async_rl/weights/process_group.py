"""Weights through a process group of their own, beside the learner's default group, of which it knows nothing.

Rank 0 is the learner, `members[i]` has rank i + 1. A group has an epoch: whenever members come, go or die, everybody
forms a new one under the next epoch, and the old one is dropped. A broadcast is the header, which says what comes, the
payload in parts, of which several are under way, and the checksums of its buckets, which both ends compute meanwhile.
It is received into staging, and handed over when it is whole and verified.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights import checksum
from async_rl.weights.checksum import BUCKET_BYTES
from async_rl.weights.errors import (
    BroadcastFailed,
    GroupIncomplete,
    GroupSuperseded,
    WeightsCorrupt,
    WeightsError,
    WeightsGone,
)
from async_rl.weights.group import Broadcast, Forming, Group, host_store
from async_rl.weights.header import SIZE, Header, name
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsId

IN_FLIGHT = 4
"""Parts: while one is checked, the next ones are on their way, on every lane."""
AT_ONCE, LEAST_PARTS = 4, 4
"""Buckets in a part at most, and parts at least where there are as many buckets: every broadcast has a price."""
KNOCK_S = 1.0
"""A connection that is not refused and does not come about is tried again, unless a newer group was called."""
LEARNER = "learner"
CPU = torch.device("cpu")


class _Member:
    """What both ends share: the present group, the one being formed, and how a newer one interrupts them."""

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        self._timeout_s, self._device = timeout_s, device
        self._lock = threading.Lock()
        self._wanted = -1
        self._forming: Forming | None = None
        self._group: Group | None = None

    def interrupt(self, epoch: int) -> None:
        """A group of this epoch is coming: what waits for members of an older one stops waiting. From any thread."""
        with self._lock:
            self._wanted = max(self._wanted, epoch)
            forming, group = self._forming, self._group
        if group is not None and group.epoch < epoch:
            group.interrupt()
        if forming is not None and forming.epoch < epoch:
            forming.interrupt()

    def close(self) -> None:
        """Leave the group."""
        self._drop()

    def _form(self, store: TCPStore, address: str, epoch: int, rank: int, names: Sequence[str]) -> None:
        self._drop()
        forming = Forming(store, address, epoch, rank, names, self._timeout_s)
        with self._lock:
            self._refuse_old(epoch)
            self._forming = forming
        try:
            group = forming.form(self._device)
        finally:
            with self._lock:
                self._forming = None
        with self._lock:
            self._group = group
            superseded = epoch < self._wanted
        if superseded:
            self._drop()
            raise GroupSuperseded(f"weight group {epoch} is being replaced")

    def _present(self) -> Group | None:
        with self._lock:
            return self._group

    def _refuse_old(self, epoch: int) -> None:
        if epoch < self._wanted:
            raise GroupSuperseded(f"weight group {epoch} is being replaced by {self._wanted}")

    def _drop(self) -> None:
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            group.drop()


class ProcessGroupSender(_Member):
    """The learner's end. Hosts the rendezvous store, on `host` and nowhere else."""

    def __init__(
        self, layout: Layout, *, host: str = "127.0.0.1", timeout_s: float = 30.0, device: torch.device = CPU
    ) -> None:
        super().__init__(timeout_s, device)
        self._layout = layout
        self._host = host
        self._store, port = host_store(host, timeout_s)
        self.store = f"{host}:{port}"
        """host:port, for Hello.weights_store."""

    @property
    def ready(self) -> bool:
        """Whether there is a group to send to."""
        return self._present() is not None

    def form(self, group: WeightGroup) -> bool:
        """Come to a new group. Returns whether there is one.

        Raises:
            GroupIncomplete, GroupSuperseded: there is no group now.
        """
        if not group.members:
            self._drop()
            return False
        self._form(self._store, self._host, group.epoch, 0, [LEARNER, *group.members])
        return True

    def send(
        self,
        weights: WeightsId,
        payload: Tensor,
        announce: Callable[[WeightsAnnounce], None],
        checksums: Sequence[int] | None = None,
    ) -> Sequence[int]:
        """Announce, so that the members join in, then broadcast. checksums: of the buckets, where they are known.
        Returns them.

        Raises:
            WeightsError: it did not arrive everywhere; there is no group now.
        """
        group = self._present()
        if group is None:
            raise BroadcastFailed(f"weights {name(weights)}: there is no weight group")
        header = Header(weights, self._layout.nbytes, 0, self._layout.fingerprint)
        announce(WeightsAnnounce(weights, "process_group", str(group.epoch), header.nbytes))
        try:
            group.broadcast(_tensor(header.encode(), group.device), f"weights {name(weights)}, header")
            found = _transfer(group, weights, payload, checksums)
            group.broadcast(_tensor(checksum.encode(found), group.device), f"weights {name(weights)}, checksums")
        except WeightsError:
            self._drop()
            raise
        return found


class ProcessGroupReceiver(_Member):
    """The generator's end. A snapshot it returns stays valid until the second `receive` after it."""

    def __init__(self, member: str, layout: Layout, *, timeout_s: float = 30.0, device: torch.device = CPU) -> None:
        super().__init__(timeout_s, device)
        self._member, self._layout = member, layout
        self._staging: list[Tensor | None] = [None, None]
        """Made by the first broadcasts: who is in no group needs none."""

    def form(self, group: WeightGroup) -> None:
        """Come to a new group, or leave where we are not among its members.

        Raises:
            GroupIncomplete, GroupSuperseded: we are in no group now.
        """
        self._drop()
        if self._member not in group.members:
            return
        host, _, port = group.store.rpartition(":")
        address = self._reach(group.epoch, host, int(port))
        try:
            store = TCPStore(
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self._timeout_s)
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise GroupIncomplete(
                f"the rendezvous store of the learner at {group.store} does not answer: {reason}"
            ) from error
        self._form(store, address, group.epoch, 1 + group.members.index(self._member), [LEARNER, *group.members])

    def _reach(self, epoch: int, host: str, port: int) -> str:
        """Our address on the way to the store, which answers. TCPStore itself knocks until its deadline, and once more,
        whatever comes meanwhile: where a learner has died, every group that was formed before its successor came would
        take so long, one after the other."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._refuse_old(epoch)
            try:
                with socket.create_connection((host, port), timeout=KNOCK_S) as reached:
                    return str(reached.getsockname()[0])
            except TimeoutError as error:
                reason = error if time.monotonic() >= deadline else None
            except OSError as error:  # refused: it stood before anybody heard of it, so its learner is gone
                reason = error
            if reason is not None:
                raise GroupIncomplete(f"the rendezvous store of the learner at {host}:{port} does not answer: {reason}")

    def receive(self, announce: WeightsAnnounce) -> Snapshot:
        """Join the broadcast that was announced. What it brings is named by its header, not by the announcement.

        Raises:
            WeightsGone: it belongs to another group than ours.
            WeightsError: it did not arrive whole; we are in no group now.
        """
        group = self._present()
        if group is None or str(group.epoch) != announce.location:
            ours = "none" if group is None else f"{group.epoch}"
            raise WeightsGone(
                f"weights {name(announce.weights)} travel in weight group {announce.location}, ours is {ours}"
            )
        staging = self._staging[0]
        if staging is None:
            staging = self._staging[0] = self._empty()
        try:
            first = torch.zeros(SIZE, dtype=torch.uint8, device=group.device)
            group.broadcast(first, f"weights {name(announce.weights)}, header")
            header = Header.decode(first.cpu().numpy().tobytes())
            header.check_layout(self._layout)
            found = _transfer(group, header.weights, staging)
            last = torch.zeros(8 * len(found), dtype=torch.uint8, device=group.device)
            group.broadcast(last, f"weights {name(header.weights)}, checksums")
            _compare(header.weights, found, checksum.decode(last.cpu().numpy().tobytes()))
        except WeightsError:
            self._drop()
            self._staging[0] = None  # an operation that hangs may write to it later
            raise
        self._staging.reverse()
        return Snapshot(header.weights, self._layout.views(staging))

    def _empty(self) -> Tensor:
        return torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=self._device)


def _transfer(group: Group, weights: WeightsId, payload: Tensor, known: Sequence[int] | None = None) -> list[int]:
    """Broadcast all of it, IN_FLIGHT parts at a time. Returns the checksums of its buckets."""
    buckets = -(-payload.numel() // BUCKET_BYTES)
    parts = payload.split(BUCKET_BYTES * max(1, min(AT_ONCE, buckets // LEAST_PARTS)))
    checksums: list[int] = []
    under_way: deque[Broadcast] = deque()

    def arrived() -> None:
        broadcast = under_way.popleft()
        broadcast.wait()
        if known is None:
            checksums.extend(map(checksum.bucket_checksum, broadcast.tensor.cpu().split(BUCKET_BYTES)))

    for index, part in enumerate(parts):
        what = f"weights {name(weights)}, part {index + 1} of {len(parts)}"
        under_way.append(group.begin(part.to(group.device), what))
        if len(under_way) == IN_FLIGHT:
            arrived()
    while under_way:
        arrived()
    return checksums if known is None else list(known)


def _compare(weights: WeightsId, found: list[int], sent: list[int]) -> None:
    """Raises WeightsCorrupt naming the first bucket that differs."""
    for index, (ours, theirs) in enumerate(zip(found, sent, strict=True)):
        if ours != theirs:
            raise WeightsCorrupt(
                f"weights {name(weights)}, bucket {index + 1} of {len(sent)}: checksum {ours:016x}, not {theirs:016x}"
            )


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
