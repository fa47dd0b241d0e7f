"""A process group of our own, formed by roll call: bare gloo or NCCL that torch.distributed's globals do not know.

Forming starts in the rendezvous store, where every member says that it is here, so that a deadline can name who is
missing. gloo cannot be interrupted: an operation in which a dead or stopped peer hangs ends at the group's timeout, and
may touch its buffer until then. So every wait here ends on completion, on `interrupt`, or at the deadline, whichever is
first; a group in which something failed is never used again, and it is destroyed in a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from async_rl.listening import listen
from async_rl.weights.errors import BroadcastFailed, GroupIncomplete, GroupSuperseded

HERE, SUPERSEDED = "here", "superseded"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Group:
    """One formed group. Not thread safe, except `interrupt`."""

    def __init__(
        self, epoch: int, rank: int, names: Sequence[str], raw: Any, device: torch.device, timeout_s: float
    ) -> None:
        self.epoch, self.rank, self.device = epoch, rank, device
        self._names, self._timeout_s = names, timeout_s
        self._raw: Any = raw
        self._condition = threading.Condition()
        self._interrupted = False

    def broadcast(self, tensor: Tensor, what: str) -> None:
        """`begin` and wait."""
        self.begin(tensor, what).wait()

    def begin(self, tensor: Tensor, what: str) -> Broadcast:
        """From rank 0 to all, in place. Broadcasts happen in the order in which they began, each to be waited for.

        Raises:
            BroadcastFailed: a member is gone.
            GroupSuperseded: `interrupt` was called.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        outcome: list[str] = []

        def done(future: Any) -> None:
            with self._condition:
                try:
                    future.wait()
                    outcome.append("")
                except Exception as error:
                    outcome.append(str(error).partition("\n")[0])
                self._condition.notify_all()

        if self._interrupted:
            raise GroupSuperseded(f"{what}: weight group {self.epoch} is being replaced")
        try:
            work = self._raw.broadcast([tensor], options)
            work.get_future().add_done_callback(done)
        except RuntimeError as error:
            raise BroadcastFailed(f"{what}: {error}") from error
        return Broadcast(self, work, tensor, what, outcome)

    def wait(self, outcome: list[str], what: str) -> None:
        """For `Broadcast.wait`."""
        with self._condition:
            self._condition.wait_for(lambda: outcome or self._interrupted, self._timeout_s)
            if self._interrupted:
                raise GroupSuperseded(f"{what}: weight group {self.epoch} is being replaced")
            if not outcome:
                others = ", ".join(self._names)
                raise BroadcastFailed(f"{what}: no progress in {self._timeout_s:.0f} s in a group of {others}")
            if outcome[0]:
                raise BroadcastFailed(f"{what}: {outcome[0]}")

    def interrupt(self) -> None:
        """Whoever waits in `broadcast` gets GroupSuperseded. From any thread."""
        with self._condition:
            self._interrupted = True
            self._condition.notify_all()

    def drop(self) -> None:
        """Give the group up. Destroying one in which an operation hangs takes until its timeout: not in our thread."""
        held = [self._raw]
        self._raw = None
        threading.Thread(target=held.clear, name="weights-drop-group", daemon=True).start()


class Broadcast:
    """One that has begun."""

    def __init__(self, group: Group, work: Any, tensor: Tensor, what: str, outcome: list[str]) -> None:
        self._group, self._work, self._what, self._outcome = group, work, what, outcome
        self.tensor = tensor
        """It is in use until `wait` returns."""

    def wait(self) -> None:
        """Until the tensor has arrived (left, on rank 0).

        Raises:
            BroadcastFailed: a member is gone, or nothing happened within the deadline.
            GroupSuperseded: `Group.interrupt` was called.
        """
        self._group.wait(self._outcome, self._what)
        if self.tensor.is_cuda:  # NCCL's future is done when the operation is enqueued, on a stream of its own
            self._work.wait()
            torch.cuda.current_stream(self.tensor.device).synchronize()


class Forming:
    """Comes to a new group; `interrupt` from another thread ends the roll call at once."""

    def __init__(self, store: TCPStore, epoch: int, rank: int, names: Sequence[str], timeout_s: float) -> None:
        self.epoch = epoch
        self._store, self._rank, self._names, self._timeout_s = store, rank, names, timeout_s
        self._second: TCPStore = cast(Any, store).clone()  # the first connection is busy while it waits
        self._keys = [f"weights/{epoch}/{index}" for index in range(len(names))]

    def form(self, device: torch.device) -> Group:
        """Wait for all members, then connect to each of them.

        Raises:
            GroupIncomplete: members did not come within the deadline; names them.
            GroupSuperseded: `interrupt` was called, here or by another member.
        """
        started = time.monotonic()
        self._roll_call()
        left = max(self._timeout_s - (time.monotonic() - started), 1.0)
        try:
            prefix = PrefixStore(f"weights/{self.epoch}", self._store)
            raw = connect(prefix, self._store.host, self._rank, len(self._names), device, left)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise GroupIncomplete(f"weight group {self.epoch} of {', '.join(self._names)}: {reason}") from error
        return Group(self.epoch, self._rank, self._names, raw, device, self._timeout_s)

    def interrupt(self) -> None:
        """Answer for the missing ones that the group will not come about."""
        for key in self._keys:
            self._second.compare_set(key, "", SUPERSEDED)

    def _roll_call(self) -> None:
        epoch = self.epoch
        if self._store.compare_set(self._keys[self._rank], "", HERE).decode() != HERE:
            raise GroupSuperseded(f"weight group {epoch} was given up before it was formed")
        try:
            self._store.wait(self._keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            missing = [who for who, key in zip(self._names, self._keys, strict=True) if not self._store.check([key])]
            raise GroupIncomplete(
                f"weight group {epoch}: {', '.join(missing) or 'nobody'} did not come within {self._timeout_s:.0f} s",
                missing,
            ) from error
        if any(answer.decode() != HERE for answer in self._store.multi_get(self._keys)):
            raise GroupSuperseded(f"weight group {epoch} was given up before it was formed")


def connect(store: Any, host: str, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A raw process group that torch.distributed's global state does not know. Blocks without the GIL."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = cast(Any, ProcessGroupGloo)._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    options._devices = [_gloo_device(host)]
    return ProcessGroupGloo(store, rank, size, options)


def _gloo_device(host: str) -> Any:
    """Loopback stays on loopback; otherwise gloo chooses (GLOO_SOCKET_IFNAME)."""
    if host in LOOPBACK:
        return ProcessGroupGloo.create_device(hostname=host)
    return ProcessGroupGloo.create_default_device()


def host_store(
    host: str, timeout_s: float, *, field: str = "weights.host", owner: str = "learner"
) -> tuple[TCPStore, int]:
    """A store server on one interface and a free port; left to itself, TCPStore would listen on all of them.

    Raises:
        UserError: `host`, which the recipe calls `field`, is no address of this machine, which is the `owner`'s.
    """
    listener = listen(host, field=field, owner=owner)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port
