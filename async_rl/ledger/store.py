"""Where ledger records live: LMDB on disk, or a dictionary, behind one awaitable `commit`.

A commit is atomic: all of its writes or none. When it returns, they are durable.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import lmdb

from async_rl.errors import UserError

INITIAL_MAP_BYTES = 64 << 20
GROWTH_FACTOR = 2

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
    """

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"ledger {path}: cannot be opened ({error})") from None
        self._env = _open(path, readonly=False)
        self._queue: queue.SimpleQueue[tuple[Writes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._commit_forever, name="ledger", daemon=True)
        self._thread.start()

    async def commit(self, writes: Writes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put((writes, done))
        await done

    def get(self, key: bytes) -> bytes | None:
        with self._env.begin() as transaction:
            return Snapshot(transaction).get(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._env.begin() as transaction:
            yield from Snapshot(transaction).scan(prefix)

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
            error: Exception | None = None
            try:
                self._write([writes for writes, _ in batch])
            except Exception as caught:
                error = caught  # raised again in every task that awaits this commit
            for _, done in batch:
                done.get_loop().call_soon_threadsafe(_settle, done, error)
            if last:
                return

    def _write(self, batch: list[Writes]) -> None:
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
    """For a process that looks at a run, also while it is at work. Raises UserError if there is nothing to read."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no ledger; write the path of a run directory whose run has begun")
    with _open(path, readonly=True) as env, env.begin() as transaction:
        yield Snapshot(transaction)


def _open(path: Path, *, readonly: bool) -> lmdb.Environment:
    try:
        return lmdb.open(str(path), map_size=INITIAL_MAP_BYTES, readonly=readonly, readahead=False)
    except (lmdb.Error, OSError) as error:
        raise UserError(f"ledger {path}: cannot be opened ({error})") from None


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
