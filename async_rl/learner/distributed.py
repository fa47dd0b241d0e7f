"""The learner's ranks: torch.distributed from the first day, also with one rank, so that nothing has two code paths.

Started by torchrun, it reads torchrun's variables; otherwise it is a world of one. gloo carries CPU tensors and control
bytes, NCCL the tensors of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from async_rl.errors import AsyncRLError, UserError

COLLECTIVE_TIMEOUT_S = 300.0
"""A rank that is silent for longer has died or hangs. An idle rank 0 sends keep-alives well within it."""


class RanksDisagree(AsyncRLError):
    """A collective operation between the learner's ranks failed: a rank died, hangs or went another way."""


def choose_device(device: str) -> torch.device:
    """`auto` = this rank's GPU where there is one, else the CPU.

    Raises:
        UserError: the device does not exist.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= (found := torch.cuda.device_count()):
            raise UserError(
                f"learner.ranks: rank {local_rank} of this machine has no GPU, it has {found}: start at most {found} "
                "ranks here, or write learner.device = 'cpu'"
            )
        return torch.device("cuda", local_rank)
    if device == "auto":
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError(f"learner.device = {device!r}: write auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"learner.device = {device!r}: this machine has {torch.cuda.device_count()} GPUs; write auto or cpu"
        )
    return chosen


class Ranks:
    """This process among the learner's ranks. Collectives are no-ops in a world of one."""

    def __init__(
        self, rank: int, size: int, device: torch.device, timeout_s: float, group: dist.ProcessGroup | None = None
    ) -> None:
        """group: None is the default one."""
        self.rank, self.size, self.device = rank, size, device
        self._timeout_s, self._group = timeout_s, group

    @classmethod
    def start(cls, device: torch.device, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Ranks:
        """Join the default group.

        Raises:
            RanksDisagree: not all ranks came within the deadline.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
                dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
            else:
                rank, size, store = 0, 1, HashStore()
                dist.init_process_group(
                    backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout_s)
                )
        except (RuntimeError, ValueError) as error:
            raise RanksDisagree(f"rank {rank} of {size} could not join the others: {_first_line(error)}") from error
        return cls(rank, size, device, timeout_s)

    def separate(self, timeout_s: float) -> Ranks:
        """The same ranks over a gloo group of their own, for CPU tensors of another thread. All ranks ask for it."""
        group: Any = None
        if self.size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return Ranks(self.rank, self.size, torch.device("cpu"), timeout_s, group)

    def sum(self, tensor: Tensor) -> None:
        """In place, over ranks."""
        if self.size > 1:
            with self.naming("a sum over ranks"):
                dist.all_reduce(tensor, group=self._group)

    def maximum(self, tensor: Tensor) -> None:
        """In place, over ranks."""
        if self.size > 1:
            with self.naming("a maximum over ranks"):
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: the same answer on all of them."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        with self.naming("a vote of all ranks"):
            dist.all_reduce(votes, group=self._group)
        return bool(votes.item())

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Rank 0 gives bytes, the others give None, and all return rank 0's bytes."""
        if self.size == 1:
            return payload or b""
        nbytes = torch.tensor([len(payload or b"")])
        with self.naming("a message of rank 0 (it sends a keep-alive when it has none)"):
            dist.broadcast(nbytes, 0, self._group)
            if not nbytes.item():
                return b""
            buffer = torch.empty(int(nbytes.item()), dtype=torch.uint8)
            if payload:
                buffer.numpy()[:] = np.frombuffer(payload, np.uint8)
            dist.broadcast(buffer, 0, self._group)
        return payload or buffer.numpy().tobytes()

    def stop(self) -> None:
        """Leave the group. Safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def naming(self, awaited: str) -> Generator[None]:
        """Turn torch's errors into one that says who waited for what, and how long at most."""
        try:
            yield
        except RuntimeError as error:
            raise RanksDisagree(
                f"rank {self.rank} of {self.size} waited for {awaited}, at most {self._timeout_s:.0f} s: "
                f"{_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
