"""Is a ledger file what LMDB may map? Read with plain reads, before LMDB sees it.

LMDB trusts its file: past the end of a truncated one it takes a bus error, a damaged page leads it anywhere, and where
the newer of the two meta pages is damaged it takes the older one without a word, and the last transaction is lost.
Beyond the walk of `lmdb.verify` over every page in use (each is reachable once, keys are in order, the counts are those
of the meta page), two invariants tell which meta page is the newer one:

    their ids differ by 1                        transactions write the two in turn
    each id is the newest in its own free list   a transaction frees what it replaced, under its id

What the records say is not looked at: each carries a CRC (ledger.records).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lmdb import verify

from async_rl.errors import LedgerCorrupt

WHAT_TO_DO = "restore a copy of the run directory, or start a new run with another --run-dir"
PAGE = struct.Struct("<QHHHH")
"""Header of a page: its number, -, flags, where its node offsets end, where its nodes begin."""
NODE = struct.Struct("<HHHH")
"""Header of a node: page number of the child in 48 bits (or size and flags of the value), size of the key."""
META_PAGE_SIZE, META_FREE_FLAGS, META_FREE_ROOT = PAGE.size + 24, PAGE.size + 28, PAGE.size + 64
META_MAIN_FLAGS, META_MAIN_ROOT, META_ID = PAGE.size + 76, PAGE.size + 112, PAGE.size + 128
"""Offsets in a meta page: 4 bytes, 2, 8, 2, 8, 8."""
FREE_FLAGS, MAIN_FLAGS = 8, 0
"""MDB_INTEGERKEY; nothing: one value a key, in the order of their bytes."""
BRANCH = 1
NO_PAGE = (1 << 64) - 1


def check_file(path: Path) -> None:
    """Nobody may write to it meanwhile. Costs 2 us a record.

    Raises:
        LedgerCorrupt: naming the file, what is wrong, and what one can do.
    """
    try:
        problems = verify.verify(str(path)) or _check_ids(path)
    except FileNotFoundError:
        problems = ["it is missing, and its lock file is there"]
    except (verify.VerifyError, struct.error, OverflowError) as error:
        problems = [str(error)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LedgerCorrupt(f"{path} is damaged: {problems[0]}{more}; {WHAT_TO_DO}")


@contextmanager
def naming(path: Path) -> Generator[None]:
    """A record that is found damaged in here is one of this file."""
    try:
        yield
    except LedgerCorrupt as error:
        if WHAT_TO_DO in str(error):
            raise
        raise LedgerCorrupt(f"{path} is damaged: {error}; {WHAT_TO_DO}") from None


def _check_ids(path: Path) -> list[str]:
    """The file is sound as seen from the meta page with the larger id: is that the newer one?"""
    with path.open("rb") as file:
        (size,) = struct.unpack("<I", os.pread(file.fileno(), 4, META_PAGE_SIZE))
        metas = [os.pread(file.fileno(), size, number * size) for number in (0, 1)]
        ids = [_u64(meta, META_ID) for meta in metas]
        if ids != [0, 0] and abs(ids[0] - ids[1]) != 1:
            return [f"its meta pages are of transactions {ids[0]} and {ids[1]}, which do not follow each other"]
        for number, meta in enumerate(metas):
            flags = [struct.unpack_from("<H", meta, offset)[0] for offset in (META_FREE_FLAGS, META_MAIN_FLAGS)]
            if flags != [FREE_FLAGS, MAIN_FLAGS]:
                return [f"meta page {number} has the flags {flags}"]
            newest = _newest_freed(file.fileno(), size, _u64(meta, META_FREE_ROOT))
            empty = _u64(meta, META_MAIN_ROOT) == NO_PAGE
            if (newest != ids[number] and ids[number] != 1) or (ids[number] == 0 and not empty):  # 1 replaced nothing
                return [f"meta page {number} says transaction {ids[number]}, but belongs to transaction {newest}"]
    return []


def _newest_freed(descriptor: int, size: int, page: int) -> int:
    """The last key in a tree of free pages, 0 where it is empty."""
    for _ in range(32):  # LMDB's own bound on the depth of a tree
        if page == NO_PAGE:
            return 0
        data = os.pread(descriptor, size, page * size)
        _, _, flags, lower, _ = PAGE.unpack_from(data)
        (node,) = struct.unpack_from("<H", data, lower - 2)
        low, middle, high, _ = NODE.unpack_from(data, node)
        if not flags & BRANCH:
            return _u64(data, node + NODE.size)
        page = low | middle << 16 | high << 32
    return 0


def _u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")
