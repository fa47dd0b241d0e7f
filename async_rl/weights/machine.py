"""Pure but for two reads: which processes can share memory. Equal names: the same kernel and the same /dev/shm."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MEMORY = Path("/dev/shm")


@functools.cache
def machine() -> str:
    """`<boot id>/<device of the tmpfs>`: containers of one host have the first in common, and the second only if they
    were given the same /dev/shm."""
    boot, memory = socket.gethostname(), ""
    with contextlib.suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    with contextlib.suppress(OSError):
        memory = str(os.stat(MEMORY).st_dev)
    return f"{boot}/{memory}"
