"""Weights into one SGLang server through a process group of its own: we are rank 0, its tensor-parallel ranks follow.

The server forms the group as torch.distributed does, without a default group; this end builds the same raw group under
the same prefixes of the store, so that neither torch.distributed's globals nor SGLang are needed here. A bucket is the
tensors' bytes end to end, which the server cuts again by names, dtypes and shapes (its `flattened_bucket`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from async_rl.engines.sglang.client import ServerError, SGLangClient
from async_rl.weights.errors import BroadcastFailed, GroupIncomplete, WeightsError
from async_rl.weights.group import Group, connect, host_store

SERIAL = itertools.count()


@dataclass(frozen=True, slots=True)
class Bucket:
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def dtypes(self) -> list[str]:
        return [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors]

    @property
    def shapes(self) -> list[Sequence[int]]:
        return [tuple(tensor.shape) for tensor in self.tensors]

    def flat(self) -> Tensor:
        """[bytes] uint8."""
        parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in self.tensors]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def buckets(tensors: Mapping[str, Tensor], nbytes: int) -> Iterator[Bucket]:
    """All tensors in order, as many in a bucket as fit; a larger one is a bucket of its own."""
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + tensor.nbytes > nbytes:
            yield Bucket(tuple(names), tuple(tensors[one] for one in names))
            names, held = [], 0
        names.append(name)
        held += tensor.nbytes
    if names:
        yield Bucket(tuple(names), tuple(tensors[one] for one in names))


class WeightPush:
    """The group with one server. Formed at the first use, and again after a failure."""

    def __init__(self, client: SGLangClient, *, host: str, backend: str, timeout_s: float) -> None:
        """host: the address of ours that the server reaches. backend: gloo or nccl."""
        self._client, self._host, self._backend, self._timeout_s = client, host, backend, timeout_s
        self._group: Group | None = None
        self._name = ""

    async def form(self) -> None:
        """Nothing to do where there is a group.

        Raises:
            ServerError, WeightsError: there is none now.
            UserError: our address is none of ours.
        """
        if self._group is not None:
            return
        info = await self._client.info()
        name = f"async_rl-{os.getpid()}-{next(SERIAL)}"
        store, port = host_store(self._host, self._timeout_s, field="generator.sglang.host", owner="generator")
        size = 1 + info.tp_size
        joined = asyncio.create_task(
            self._client.init_group(self._host, port, size, name, self._backend, self._timeout_s)
        )
        formed = asyncio.create_task(asyncio.to_thread(self._form, store, name, size))
        try:
            await _both(joined, formed)
        except (RuntimeError, WeightsError) as error:
            raise GroupIncomplete(f"weight group with {self._client.url}: {str(error).splitlines()[0]}") from error
        self._group, self._name = formed.result(), name

    def _form(self, store: TCPStore, name: str, size: int) -> Group:
        """torch names the one backend it makes after the first kind of device that the backend serves; gloo's also
        carries tensors of a GPU."""
        device = torch.device("cuda" if self._backend == "nccl" else "cpu")
        prefix = PrefixStore(f"{device.type}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
        raw = connect(prefix, self._host, 0, size, device, self._timeout_s)
        return Group(0, 0, [self._client.url], [raw], device, self._timeout_s)

    async def send(self, bucket: Bucket, *, version: str, flush: bool) -> None:
        """The server has loaded it when this returns.

        Raises:
            ServerError, WeightsError: it may have loaded it or not; the group is gone.
        """
        group = self._group
        if group is None:
            raise BroadcastFailed(f"there is no weight group with {self._client.url}")

        def broadcast() -> None:
            group.broadcast(bucket.flat().to(group.device), f"weights for {self._client.url}")

        loaded = asyncio.create_task(
            self._client.receive_bucket(
                bucket.names,
                bucket.dtypes,
                bucket.shapes,
                self._name,
                self._timeout_s,
                version=version,
                flush=flush,
            )
        )
        sent = asyncio.create_task(asyncio.to_thread(broadcast))
        try:
            await _both(loaded, sent, on_failure=group.interrupt)
        except (ServerError, WeightsError):
            self.drop()
            raise

    def drop(self) -> None:
        """Give the group up on this end."""
        if self._group is not None:
            self._group.drop()
        self._group = None

    async def close(self) -> None:
        """Leave it on both ends, as far as the server answers."""
        name, self._name = self._name, ""
        self.drop()
        if name:
            try:
                await self._client.destroy_group(name)
            except ServerError:
                return  # it knows no such group, or is gone


async def _both(server: asyncio.Task[None], ours: asyncio.Task[Any], on_failure: Any = None) -> None:
    """Wait for the server's half and for ours; what fails first is raised. Our half runs in a thread that ends at the
    group's deadline at the latest, whether it is waited for or not."""
    try:
        done, _ = await asyncio.wait([server, ours], return_when=asyncio.FIRST_EXCEPTION)
        for task in sorted(done, key=lambda task: task is ours):  # the server's reason says more
            task.result()
    except BaseException:
        server.cancel()
        if on_failure is not None:
            on_failure()
        ours.add_done_callback(_forget)
        raise


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
