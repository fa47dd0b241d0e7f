"""Where the files of a run's weights are; no torch, so that whoever ends a run can remove them."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from pathlib import Path

MEMORY = Path("/dev/shm")


def memory_directory(run_directory: Path, memory: Path = MEMORY) -> Path | None:
    """This run's directory in memory, made if need be; None where there is no tmpfs we may write to."""
    directory = memory / f"async-rl-{_digest(run_directory)}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return directory if ours and os.access(directory, os.W_OK) else None


def disk_directory(run_directory: Path) -> Path:
    """Where the files are when memory will not have them."""
    return run_directory / "weights"


def cleanup(run_directory: Path, memory: Path = MEMORY) -> None:
    """Remove every weights file of this run. For the end of a run; receivers keep what they have mapped."""
    shutil.rmtree(memory / f"async-rl-{_digest(run_directory)}", ignore_errors=True)
    shutil.rmtree(disk_directory(run_directory), ignore_errors=True)


def _digest(run_directory: Path) -> str:
    return hashlib.sha256(str(run_directory.resolve()).encode()).hexdigest()[:16]
