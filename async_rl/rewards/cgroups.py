"""A memory and a process limit for everything in a sandbox together, where the machine lets us make control groups.

As root at the top of the hierarchy, as a user below the group we are in or beside it, where systemd has delegated that.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

ROOT = Path("/sys/fs/cgroup")
PREFIX = "async_rl."
"""And the id of the process that made it."""


class Cgroup(Protocol):
    version: int

    def join(self) -> None:
        """The calling process, and all it starts."""
        ...

    def killed_for_memory(self) -> int:
        """How many processes so far."""
        ...

    def refused_processes(self) -> int:
        """How many so far."""
        ...

    def remove(self) -> None:
        """Nobody is in it any more."""
        ...


def make(memory: int, processes: int, root: Path = ROOT) -> Cgroup | None:
    """None: this machine does not let us. memory: bytes. root: where the hierarchy is mounted."""
    _sweep(root)
    for kind in (_Two, _One):
        found = kind.make(root, memory, processes)
        if found is not None and _can_join(found):
            return found
    return None


class _One:
    """Version 1: a hierarchy per controller."""

    version = 1

    def __init__(self, memory: Path, pids: Path) -> None:
        self._memory, self._pids = memory, pids

    @classmethod
    def make(cls, root: Path, memory: int, processes: int) -> _One | None:
        memory_group, pids_group = _place("memory", "pids")
        made = cls(root / "memory" / memory_group / _name(), root / "pids" / pids_group / _name())
        try:
            made._memory.mkdir()
            made._pids.mkdir()
            _write(made._memory / "memory.limit_in_bytes", memory)
            with contextlib.suppress(OSError):  # not every kernel accounts for swap
                _write(made._memory / "memory.memsw.limit_in_bytes", memory)
            _write(made._pids / "pids.max", processes)
        except OSError:
            made.remove()
            return None
        return made

    def join(self) -> None:
        _write(self._memory / "cgroup.procs", 0)
        _write(self._pids / "cgroup.procs", 0)

    def killed_for_memory(self) -> int:
        return _count(self._memory / "memory.oom_control", "oom_kill")

    def refused_processes(self) -> int:
        return _count(self._pids / "pids.events", "max")

    def remove(self) -> None:
        _remove(self._memory, self._pids)


class _Two:
    """Version 2: one hierarchy. Processes and controllers for children exclude each other in a group that is not the
    root, hence the group beside ours."""

    version = 2

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def make(cls, root: Path, memory: int, processes: int) -> _Two | None:
        (own,) = _place("")
        for parent in [root] if own == "." else [root / own, (root / own).parent]:
            made = cls(parent / _name())
            try:
                with contextlib.suppress(OSError):
                    _write(parent / "cgroup.subtree_control", "+memory +pids")
                made._path.mkdir()
                _write(made._path / "memory.max", memory)
                with contextlib.suppress(OSError):
                    _write(made._path / "memory.swap.max", 0)
                _write(made._path / "pids.max", processes)
            except OSError:
                made.remove()
            else:
                return made
        return None

    def join(self) -> None:
        _write(self._path / "cgroup.procs", 0)

    def killed_for_memory(self) -> int:
        return _count(self._path / "memory.events", "oom_kill")

    def refused_processes(self) -> int:
        return _count(self._path / "pids.events", "max")

    def remove(self) -> None:
        _remove(self._path)


def _place(*controllers: str) -> tuple[str, ...]:
    """The group to make ours in, by controller, as a path below the mount: "." is the root."""
    if os.geteuid() == 0:
        return tuple("." for _ in controllers)
    own = dict.fromkeys(controllers, ".")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            for name in names.split(","):
                if name in own:
                    own[name] = path.lstrip("/") or "."
    return tuple(own.values())


def _can_join(group: Cgroup) -> bool:
    """Whether a child can: to make a group and to move into it are different rights."""
    child = os.fork()
    if child == 0:
        try:
            group.join()
        except OSError:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        group.remove()
    return status == 0


def _name() -> str:
    return f"{PREFIX}{os.getpid()}"


def _write(path: Path, value: int | str) -> None:
    """Only what exists: in a directory that is no control group nothing would be limited."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _count(path: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.rmdir()


def _sweep(root: Path) -> None:
    """What graders that were killed have left, for a group cannot end with its maker."""
    if os.geteuid() != 0:
        return
    for folder in (root, root / "memory", root / "pids"):
        for left in folder.glob(f"{PREFIX}*"):
            maker = left.name.removeprefix(PREFIX)
            if maker.isdecimal() and not Path(f"/proc/{maker}").exists():
                _remove(left)
