"""A process group of our own, formed by roll call: bare gloo or NCCL that torch.distributed's globals do not know.

Forming starts in the rendezvous store, where every member says that it is here, so that a deadline can name who is
missing. gloo cannot be interrupted: an operation in which a dead or stopped peer hangs ends at the group's timeout, and
may touch its buffer until then. So every wait here ends on completion, on `interrupt`, or at the deadline, whichever is
first; a group in which something failed is never used again, and it is destroyed in a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from async_rl.listening import is_loopback, listen
from async_rl.weights.errors import BroadcastFailed, GroupIncomplete, GroupSuperseded

HERE, SUPERSEDED = "here", "superseded"
LANES = 2
"""Connections to each member. gloo moves what goes over one of them with one thread at each end, which a fast network
and even loopback outrun."""
LATE_S = 5.0
"""After its deadline gloo should have given up by itself."""


class Group:
    """One formed group. Not thread safe, except `interrupt`."""

    def __init__(
        self, epoch: int, rank: int, names: Sequence[str], lanes: Sequence[Any], device: torch.device, timeout_s: float
    ) -> None:
        self.epoch, self.rank, self.device = epoch, rank, device
        self._names, self._timeout_s = names, timeout_s
        self._lanes = lanes
        self._begun = 0
        """Broadcasts: each takes the next lane, here as at every other member."""
        self._condition = threading.Condition()
        self._interrupted = False

    def broadcast(self, tensor: Tensor, what: str) -> None:
        """`begin` and wait."""
        self.begin(tensor, what).wait()

    def begin(self, tensor: Tensor, what: str) -> Broadcast:
        """From rank 0 to all, in place. All members begin the same broadcasts in the same order, each to be waited for.

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
            work = self._lanes[self._begun % len(self._lanes)].broadcast([tensor], options)
            self._begun += 1
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
        held = list(self._lanes)
        self._lanes = ()
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
    """Comes to a new group; `interrupt` from another thread ends that at once.

    address: of ours, where the other members reach us.
    """

    def __init__(
        self, store: TCPStore, address: str, epoch: int, rank: int, names: Sequence[str], timeout_s: float
    ) -> None:
        self.epoch, self._address = epoch, address
        self._rank, self._names, self._timeout_s = rank, names, timeout_s
        # a connection is busy while it waits: one that is given up must not hold up the next group, nor an interrupt
        self._store, self._second = cast(Any, store).clone(), cast(Any, store).clone()
        self._keys = [f"weights/{epoch}/{index}" for index in range(len(names))]
        self._condition = threading.Condition()
        self._interrupted = False

    def form(self, device: torch.device) -> Group:
        """Wait for all members, then connect to each of them.

        Raises:
            GroupIncomplete: members did not come within the deadline; names them.
            GroupSuperseded: `interrupt` was called, here or by another member.
        """
        started = time.monotonic()
        self._roll_call()
        left = max(self._timeout_s - (time.monotonic() - started), 1.0)
        return Group(self.epoch, self._rank, self._names, self._connected(device, left), device, self._timeout_s)

    def interrupt(self) -> None:
        """Answer for the missing ones that the group will not come about."""
        with self._condition:
            self._interrupted = True
            self._condition.notify_all()
        for key in self._keys:
            self._second.compare_set(key, "", SUPERSEDED)

    def _connected(self, device: torch.device, timeout_s: float) -> list[Any]:
        """gloo cannot be interrupted, and waits for a member that has come and is cut off now until its deadline."""
        outcome: list[list[Any] | Exception] = []
        lanes = 1 if device.type == "cuda" else LANES

        def lane(number: int) -> Any:
            prefix = PrefixStore(f"weights/{self.epoch}/lane/{number}", self._store)
            return connect(prefix, self._address, self._rank, len(self._names), device, timeout_s)

        def work() -> None:
            made: list[Any] | Exception
            try:
                made = [lane(number) for number in range(lanes)]
            except Exception as error:
                made = error
            with self._condition:
                outcome.append(made)
                self._condition.notify_all()

        threading.Thread(target=work, name="weights-connect", daemon=True).start()
        with self._condition:
            self._condition.wait_for(lambda: outcome or self._interrupted, timeout_s + LATE_S)
            if self._interrupted:
                raise GroupSuperseded(f"weight group {self.epoch} is being replaced")
            found = outcome[0] if outcome else TimeoutError(f"not connected within {timeout_s:.0f} s")
        if isinstance(found, Exception):
            reason = str(found).partition("\n")[0]
            raise GroupIncomplete(f"weight group {self.epoch} of {', '.join(self._names)}: {reason}") from found
        return found

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


def connect(store: Any, address: str, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """A raw process group that torch.distributed's global state does not know. Blocks without the GIL."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = cast(Any, ProcessGroupGloo)._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    # gloo itself would take what this machine's name resolves to: often loopback
    where = {"interface": interface} if interface and not is_loopback(address) else {"hostname": address}
    options._devices = [ProcessGroupGloo.create_device(**where)]
    return ProcessGroupGloo(store, rank, size, options)


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
