"""Where ledger records live: LMDB on disk, or a dictionary, behind one awaitable `commit`.

A commit is atomic: all of its writes or none. When it returns, they are durable. After one that failed there is no
other: what follows may rest on what is missing.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import queue
import shutil
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import lmdb

from async_rl.errors import LedgerCorrupt, UserError
from async_rl.ledger.integrity import check_file, naming

INITIAL_MAP_BYTES = 64 << 20
GROWTH_FACTOR = 2
DATA, LOCK, NEW = "data.mdb", "lock.mdb", "new"
LOCK_BYTES = 8192
"""LMDB maps its lock file; what is written to a hole of it when the disk is full is a bus error."""
FULL_DISK_BYTES = 1 << 20
"""With less than this free, a commit that failed lacked space: LMDB calls a write that was cut short an I/O error."""
DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError, lmdb.VersionMismatchError)

Writes = Mapping[bytes, bytes | None]
"""key -> value, or None to delete it"""


class Reader(Protocol):
    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Records whose key starts with `prefix`, in key order."""
        ...


class Store(Reader, Protocol):
    async def commit(self, writes: Writes) -> None: ...

    async def close(self) -> None: ...


class MemoryStore:
    """Nothing survives the process; the transitions above it are the same."""

    def __init__(self) -> None:
        self._records: dict[bytes, bytes] = {}

    async def commit(self, writes: Writes) -> None:
        for key, value in writes.items():
            if value is None:
                self._records.pop(key, None)
            else:
                self._records[key] = value

    def get(self, key: bytes) -> bytes | None:
        return self._records.get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted((key, value) for key, value in self._records.items() if key.startswith(prefix))

    async def close(self) -> None:
        pass


class LmdbStore:
    """One writer thread, because a sync to disk takes milliseconds; commits that wait together share one sync.

    Args:
        path: directory of the environment; made if it does not exist.

    Raises:
        UserError: it cannot be opened or made. LedgerCorrupt: it is damaged (ledger.integrity).
    """

    def __init__(self, path: Path) -> None:
        try:
            _make(path)
            check_file(path / DATA)
            with (path / LOCK).open("ab") as lock:
                os.posix_fallocate(lock.fileno(), 0, LOCK_BYTES)
        except OSError as error:
            raise UserError(f"ledger {path}: cannot be opened ({error.strerror})") from None
        self._path, self._env = path, _open(path, readonly=False)
        self._growing = threading.Lock()
        """Held while the map moves, and by who reads from it."""
        self._failure: Exception | None = None
        """What the first failed commit raised; so does every later one."""
        self._queue: queue.SimpleQueue[tuple[Writes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._commit_forever, name="ledger", daemon=True)
        self._thread.start()

    async def commit(self, writes: Writes) -> None:
        """Raises UserError (the disk is full), LedgerCorrupt; then the run has to stop."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put((writes, done))
        await done

    def get(self, key: bytes) -> bytes | None:
        with self._growing, self._env.begin() as transaction:
            return Snapshot(transaction).get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._growing, self._env.begin() as transaction:
            found = list(Snapshot(transaction).scan(prefix))
        return iter(found)

    async def close(self) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._env.close()

    def _commit_forever(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    last = True
                    break
                batch.append(more)
            if self._failure is None:
                try:
                    self._write([writes for writes, _ in batch])
                except Exception as error:  # raised again in every task that awaits this commit
                    self._failure = _explain(self._path, error) if isinstance(error, lmdb.Error) else error
            for _, done in batch:
                with suppress(RuntimeError):  # its loop is closed: nobody waits
                    done.get_loop().call_soon_threadsafe(_settle, done, self._failure)
            if last:
                return

    def _write(self, batch: Sequence[Writes]) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for writes in batch:
                        for key, value in writes.items():
                            if value is None:
                                transaction.delete(key)
                            else:
                                transaction.put(key, value)
                return
            except lmdb.MapFullError:
                with self._growing:
                    self._env.set_mapsize(self._env.info()["map_size"] * GROWTH_FACTOR)


class Snapshot:
    """What an LMDB store holds at one moment, whatever is committed meanwhile."""

    def __init__(self, transaction: lmdb.Transaction) -> None:
        self._transaction = transaction

    def get(self, key: bytes) -> bytes | None:
        value = self._transaction.get(key)
        return None if value is None else bytes(value)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._transaction.cursor() as cursor:
            if not cursor.set_range(prefix):
                return
            for key, value in cursor:
                if not bytes(key).startswith(prefix):
                    return
                yield bytes(key), bytes(value)

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        """As `scan`, without touching the pages that hold the values."""
        with self._transaction.cursor() as cursor:
            if not cursor.set_range(prefix):
                return
            for key in cursor.iternext(keys=True, values=False):
                if not bytes(key).startswith(prefix):
                    return
                yield bytes(key)


@contextmanager
def snapshot(path: Path) -> Generator[Snapshot]:
    """For a process that looks at a run, also while it is at work.

    Raises:
        UserError: there is nothing to read. LedgerCorrupt: it is damaged (ledger.integrity).
    """
    if not (path / DATA).exists() and not (path / LOCK).exists():
        raise UserError(f"{path}: there is no ledger; write the path of a run directory whose run has begun")
    with _alone(path) as alone:
        if alone:  # else whoever has it open has checked it, and may write to it
            check_file(path / DATA)
    with _open(path, readonly=True) as env, env.begin() as transaction, naming(path / DATA):
        yield Snapshot(transaction)


def _make(path: Path) -> None:
    """A new ledger appears whole: one that is empty or not there, beside its lock file, was lost."""
    if (path / DATA).exists() or (path / LOCK).exists():
        return
    new = path / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _open(new, readonly=False).close()
    (new / DATA).rename(path / DATA)
    shutil.rmtree(new)
    for directory in (path, path.parent):
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def _alone(path: Path) -> Generator[bool]:
    """Whether no process has the environment open; and none can open it for writing meanwhile."""
    try:
        with (path / LOCK).open("r+b") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)  # LMDB holds a shared one
            except OSError:
                yield False
            else:
                yield True
    except FileNotFoundError:
        yield True


def _open(path: Path, *, readonly: bool) -> lmdb.Environment:
    try:
        return lmdb.open(str(path), map_size=INITIAL_MAP_BYTES, readonly=readonly, readahead=False)
    except (lmdb.Error, OSError) as error:
        raise UserError(f"ledger {path}: cannot be opened ({error})") from None


def _explain(path: Path, error: lmdb.Error) -> Exception:
    """What a failed commit means to who runs this."""
    if isinstance(error, DAMAGE):
        return LedgerCorrupt(f"{path / DATA} is damaged: {error}")
    disk = os.statvfs(path)
    full = isinstance(error, lmdb.DiskError) or disk.f_bavail * disk.f_frsize < FULL_DISK_BYTES
    what = f"{os.strerror(errno.ENOSPC)}: free some" if full else f"cannot be written ({error}): mend that"
    return UserError(f"ledger {path}: {what} and start again with the same command; what was committed is safe")


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
