"""Where ledger records live: LMDB on disk, or a dictionary, behind one awaitable `commit`.

A commit is atomic: all of its writes or none. When it returns, they are durable.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import lmdb

from async_rl.errors import UserError

INITIAL_MAP_BYTES = 64 << 20
GROWTH_FACTOR = 2

Writes = Mapping[bytes, bytes | None]
"""key -> value, or None to delete it"""


class Store(Protocol):
    async def commit(self, writes: Writes) -> None: ...

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Records whose key starts with `prefix`, in key order."""
        ...

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
        readonly: for other processes that look at a run (`inspect`).
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        try:
            if not readonly:
                path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(str(path), map_size=INITIAL_MAP_BYTES, readonly=readonly, readahead=False)
        except (lmdb.Error, OSError) as error:
            raise UserError(f"ledger {path}: cannot be opened ({error})") from None
        self._queue: queue.SimpleQueue[tuple[Writes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._thread = None if readonly else threading.Thread(target=self._commit_forever, name="ledger", daemon=True)
        if self._thread is not None:
            self._thread.start()

    async def commit(self, writes: Writes) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put((writes, done))
        await done

    def get(self, key: bytes) -> bytes | None:
        with self._env.begin() as transaction:
            value = transaction.get(key)
            return None if value is None else bytes(value)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            if not cursor.set_range(prefix):
                return
            for key, value in cursor:
                if not bytes(key).startswith(prefix):
                    return
                yield bytes(key), bytes(value)

    async def close(self) -> None:
        if self._thread is not None:
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


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
