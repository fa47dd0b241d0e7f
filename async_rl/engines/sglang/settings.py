"""How an engine over SGLang servers finds, starts and feeds them.

What happens to requests in flight when weights change (`in_flight`):

recompute   they are retracted, every cache is flushed, and what they have is prefilled again under the new weights
keep        they stand still and go on over the keys and values of the old weights (`kv_version` says so)
drain       nothing begins until all pieces have ended: no piece has two versions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from async_rl.engines.sglang.keys import Keys

InFlight = Literal["recompute", "keep", "drain"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How servers are found, started and fed."""

    command: Sequence[str] = ()
    """Starts a server, `{port}` where the port goes; empty: attach."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    log: Path = Path("sglang.log")
    """What a server that we start prints."""
    scratch: Path = Path("sglang")
    """Weights that a server reads from disk are written here, and removed afterwards."""
    attach: Sequence[str] = ()
    """Servers that run already."""
    router: str = ""
    """Requests go here, to be passed on to one of the servers in `attach`; everything else goes to each of them."""
    keys: Keys = field(default_factory=Keys)
    in_flight: InFlight = "recompute"
    load_by: Literal["group", "disk"] = "group"
    backend: str = "gloo"
    """Of the weight group."""
    host: str = "127.0.0.1"
    """The address of this machine that the servers reach."""
    timeout_s: float = 30.0
    """For each bucket of weights, and for forming a group."""
    pause_s: float = 30.0
    start_s: float = 600.0
    drain_s: float = 600.0
    stuck_s: float = 30.0
    stream_tokens: int = 16
    off_device: bool = False
    """The device is shared: a server of ours starts with the first weights, and not while it is off the device."""
    bucket_bytes: int = 64 << 20
    """Buckets hold whole tensors: a larger tensor is a bucket of its own."""
    copy: bool = False
    """Snapshots are only lent, and overwritten by the next but one: keep one of our own, for a server that dies."""
