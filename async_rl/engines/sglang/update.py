"""New weights for one SGLang server: pause -> begin -> buckets -> version -> end -> resume, and if that fails:

    nothing loaded yet        the server goes on with the old weights, and the caller hears why
    it had no weights, or
    anything later            it stays paused; the whole snapshot is read from disk, checked, and only then it resumes
    that fails as well        ServerBroken: it stays paused, for what it would sample with has no version

Everything that takes time and needs no pause (forming a group) happens before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang.client import PauseMode, ServerError, ServerRefused, SGLangClient
from async_rl.engines.sglang.contract import half_name, version_name
from async_rl.engines.sglang.lease import PauseLease
from async_rl.engines.sglang.push import WeightPush, buckets
from async_rl.weights.errors import WeightsError

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""How SGLang keeps what Hugging Face names one by one."""
PADDED = {
    "embed_tokens": (64, 1),
    "lm_head": (64, 1),
    "gate_proj": (32, 1),
    "up_proj": (32, 1),
    "down_proj": (1, 32),
}
"""Matrices that SGLang pads with zeros on a CPU: rows and columns up to multiples of these."""
DISK_TRIES = 3
log = logging.getLogger(__name__)


class ServerBroken(ServerError):
    """The server's weights are neither old nor new, and nothing would load: it must be started again."""


class OthersWeights(ServerRefused):
    """The server's weights are whole, and not those it was told to load."""


class ServerWeights:
    """What one server samples with."""

    def __init__(
        self,
        client: SGLangClient,
        push: WeightPush | None,
        scratch: Path,
        *,
        mode: PauseMode,
        pause_s: float,
        timeout_s: float,
        bucket_bytes: int,
        owner: str,
    ) -> None:
        """push: None loads from disk always. scratch: a directory the server can read, for that. owner: whose weights
        these are (engines.sglang.contract)."""
        self._client, self._push, self._scratch = client, push, scratch
        self._mode: PauseMode = mode
        self._owner = owner
        self._pause_s, self._timeout_s, self._bucket_bytes = pause_s, timeout_s, bucket_bytes
        self.reloads = 0
        """How often a failed update was mended from disk."""

    async def load(
        self, snapshot: Snapshot, swapped: Callable[[], None] = lambda: None, *, anew: bool = False
    ) -> PauseLease:
        """The server samples with the snapshot when this returns. Returns the pause it took.

        swapped: called at the end of it.
        anew: what it holds is not known to be ours. So its cache is flushed, whatever the mode: somebody else's weights
            may have written there under a name of ours.

        Raises:
            ServerGone: it is not there.
            ServerBroken: see above.
            ServerRefused, WeightsError: nothing has changed.
        """
        if self._push is not None:
            await self._push.form()
        mode = "retract" if anew else self._mode
        flush = mode == "retract"  # one in place keeps the cache; a flush would be refused, with the weights changed
        async with PauseLease(self._client, mode, seconds=self._pause_s) as lease:
            if self._push is None:
                await self._reload(lease, snapshot, flush)
            else:
                try:
                    await self._by_group(lease, self._push, snapshot, flush)
                except (ServerRefused, WeightsError) as error:
                    if not (lease.dirty or self._client.empty):
                        raise
                    log.warning("%s; the server stays paused and reads all weights from disk", error)
                    self.reloads += 1
                    await self._reload(lease, snapshot, flush)
            swapped()
        return lease

    async def close(self) -> None:
        if self._push is not None:
            await self._push.close()

    async def _by_group(self, lease: PauseLease, push: WeightPush, snapshot: Snapshot, flush: bool) -> None:
        await self._begin()
        parts = list(buckets(snapshot.tensors, self._bucket_bytes))
        try:
            lease.soil()
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                if number > 1:
                    await self._still_ours()
                version = version_name(self._owner, snapshot.weights) if last else half_name(self._owner)
                await push.send(part, version=version, flush=last and flush)
        finally:
            await self._client.end_update()
        lease.clean()

    async def _still_ours(self) -> None:
        """What is loaded so far is. Nothing keeps another run from loading into the same server meanwhile, and the last
        bucket would call all of it ours.

        Raises:
            ServerRefused: no.
        """
        found = await self._client.weight_version()
        if found != half_name(self._owner):
            raise ServerRefused(
                f"SGLang server {self._client.url}: somebody loaded weights {found} between our buckets"
            )

    async def _begin(self) -> None:
        """A session that somebody left open, because they died in it, is closed."""
        try:
            await self._client.begin_update()
        except ServerRefused:
            await self._client.end_update()
            await self._client.begin_update()

    async def _reload(self, lease: PauseLease, snapshot: Snapshot, flush: bool) -> None:
        lease.soil()
        if self._push is not None:
            await self._push.close()
        version = version_name(self._owner, snapshot.weights)
        directory = self._scratch / version
        try:
            await asyncio.to_thread(_write, snapshot.tensors, directory)
            for tries in range(1, DISK_TRIES + 1):
                await self._client.load_from_disk(str(directory), version, self._timeout_s, flush=flush)
                try:
                    await self._verify(snapshot, version)
                    break
                except OthersWeights as error:  # somebody else was at it at the same moment
                    if tries == DISK_TRIES:
                        raise
                    log.warning("%s: once more", error)
        except (ServerRefused, OSError) as error:
            raise ServerBroken(
                f"{error}; the weights of {self._client.url} are half loaded, so it stays paused. It was to read "
                f"them from {directory}, which must be the same directory there"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(directory)
        lease.clean()

    async def _verify(self, snapshot: Snapshot, version: str) -> None:
        """The server says that it holds this version, and its checksums are those of the snapshot. On a CPU they are
        SHA-256, which we compute too; on CUDA and over several ranks there is nothing to compare with."""
        named = await self._client.weight_version()
        if named != version:
            raise OthersWeights(f"SGLang server {self._client.url} holds weights {named}, not {version}")
        info = await self._client.info()
        if info.device != "cpu" or info.tp_size > 1:
            log.warning("%s: weights read from disk, checksums of a %s cannot be compared", info.device, info.device)
            return
        (found,) = await self._client.checksums(self._timeout_s)
        for name, checksum in (await asyncio.to_thread(checksums, snapshot.tensors)).items():
            if found.get(name) != checksum:
                raise ServerRefused(
                    f"SGLang server {self._client.url}: {name} has checksum {found.get(name)}, not {checksum}"
                )


def _write(tensors: Mapping[str, Tensor], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors")


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter of the server's model -> the first 8 bytes of the SHA-256 of its bytes, in hex."""
    found: dict[str, str] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(_fused(name), []).append(_padded(name, tensor))
    for name, group in parts.items():
        digest = hashlib.sha256()
        for tensor in group:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()[:16]
    return found


def _padded(name: str, tensor: Tensor) -> Tensor:
    kind = name.split(".")[-2]
    if kind not in PADDED or tensor.dim() != 2:
        return tensor
    (rows, columns), (by_rows, by_columns) = tensor.shape, PADDED[kind]
    return torch.nn.functional.pad(tensor, (0, -columns % by_columns, 0, -rows % by_rows))


def _fused(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `model.layers.0.self_attn.qkv_proj.weight`. The parts come in the
    order q, k, v and gate, up: that of the model's own parameters."""
    for fused, singles in FUSED.items():
        for single in singles:
            if f".{single}." in name:
                return name.replace(f".{single}.", f".{fused}.")
    return name
