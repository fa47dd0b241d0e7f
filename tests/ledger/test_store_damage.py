"""A damaged ledger file is named and refused, never read as if it were whole; a commit that fails ends the run."""

from __future__ import annotations

import asyncio
import json
import random
import re
import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import lmdb
import pytest

from async_rl.errors import LedgerCorrupt, UserError
from async_rl.ledger import records
from async_rl.ledger.integrity import check_file
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.records import EventRecord
from async_rl.ledger.store import LmdbStore, snapshot
from async_rl.wire.messages import Task

PAGE, META = 4096, 152
LAST_PAGE, TRANSACTION = 16 + 120, 16 + 128
"""Offsets in a meta page."""


def write(path: Path, transactions: int) -> bytes:
    """A ledger with small and large records, some of them deleted again. Returns its file."""
    rng = random.Random(1)

    async def main() -> None:
        store = LmdbStore(path)
        for t in range(transactions):
            events = [t * 5 + i for i in range(5)]
            told = {records.event_key(n): EventRecord(n, [0], "trained", "r" * 30) for n in events}
            told[b"payload/%04x" % t] = EventRecord(t, [], "trained", rng.randbytes(3000).hex())
            writes: dict[bytes, bytes | None] = {key: records.encode(key, record) for key, record in told.items()}
            writes[b"payload/%04x" % (t - 7)] = None
            await store.commit(writes)
        await store.close()

    asyncio.run(main())
    check_file(path / "data.mdb")
    return (path / "data.mdb").read_bytes()


READER = textwrap.dedent("""
    import json, shutil, sys
    from pathlib import Path
    from async_rl.errors import LedgerCorrupt
    from async_rl.ledger import records
    from async_rl.ledger.records import EventRecord
    from async_rl.ledger.store import snapshot

    good, damage = Path(sys.argv[1]), json.loads(sys.argv[2])
    content = good.read_bytes()

    def read(path):
        with snapshot(path) as store:
            found = list(store.scan(b""))
        return found, [records.decode(key, value, EventRecord) for key, value in found]

    whole = read(good.parent)
    for kind, where in damage:
        path = good.parent.parent / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        changed = bytearray(content[:where] if kind == "truncate" else content)
        if kind == "flip":
            changed[where // 8] ^= 1 << where % 8
        (path / "data.mdb").write_bytes(changed)
        try:
            same = read(path) == whole
        except LedgerCorrupt as error:
            print("refused" if "data.mdb is damaged" in str(error) else "refused a record", flush=True)
        else:
            print("same" if same else f"OTHER after {kind} {where}", flush=True)
""")


def read_damaged(good: Path, damage: list[tuple[str, int]]) -> list[str]:
    """What a reader in a process of its own makes of each: it would crash, if it did."""
    command = [sys.executable, "-c", READER, str(good), json.dumps(damage)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert done.returncode == 0, f"{done.stderr}\nexit code {done.returncode} at {damage[len(found)]}"
    return found


@pytest.mark.parametrize("transactions", [1, 2, 40, 41])
def test_bits_of_the_meta_pages(tmp_path: Path, transactions: int) -> None:
    """Flipped: found, or without effect. Never the transaction before the last, which is what LMDB would read."""
    write(tmp_path / "ledger", transactions)
    bits = [page * PAGE * 8 + bit for page in (0, 1) for bit in range(META * 8)]
    ids = [bit for bit in bits if bit // 8 % PAGE in range(TRANSACTION, TRANSACTION + 8)]
    bits = [*ids, *random.Random(transactions).sample(bits, 200)]
    found = read_damaged(tmp_path / "ledger" / "data.mdb", [("flip", bit) for bit in bits])
    assert set(found) == {"refused", "same"}


def test_lengths_and_bytes(tmp_path: Path) -> None:
    rng = random.Random(1)
    content = write(tmp_path / "ledger", 60)
    damage = [("truncate", length) for length in (0, 1, PAGE, 2 * PAGE, len(content) // 2)]
    damage += [("truncate", rng.randrange(len(content))) for _ in range(30)]
    damage += [("flip", rng.randrange(2 * PAGE * 8, len(content) * 8)) for _ in range(400)]
    keys = list(re.finditer(rb"(event|payload)/[0-9a-f]+", content))  # and the header of its node before each
    damage += [("flip", rng.randrange((k.start() - 8) * 8, k.end() * 8)) for k in rng.choices(keys, k=200)]
    found = read_damaged(tmp_path / "ledger" / "data.mdb", damage)
    assert set(found[:5]) == {"refused"}
    assert set(found) == {"refused", "refused a record", "same"}, found


@pytest.mark.parametrize("newest", [True, False])
def test_a_meta_page_that_looks_older_or_newer(tmp_path: Path, newest: bool) -> None:
    """Bit 1 of its id: then the two ids still follow each other, and LMDB takes the wrong one."""
    transactions = 6 if newest else 9
    content = bytearray(write(tmp_path / "ledger", transactions))
    ids = [struct.unpack_from("<Q", content, page * PAGE + TRANSACTION)[0] for page in (0, 1)]
    page = ids.index(max(ids) if newest else min(ids))
    content[page * PAGE + TRANSACTION] ^= 2
    (tmp_path / "ledger" / "data.mdb").write_bytes(content)
    with pytest.raises(LedgerCorrupt, match=rf"data.mdb is damaged: meta page {page} says transaction"):
        LmdbStore(tmp_path / "ledger")
    with lmdb.open(str(tmp_path / "ledger"), readonly=True) as env:
        assert env.info()["last_txnid"] != max(ids), "this is what LMDB says of it"


def test_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with pytest.raises(UserError, match="there is no ledger"), snapshot(path):
        pass
    write(path, 1)
    (path / "data.mdb").write_bytes(b"")
    with pytest.raises(LedgerCorrupt, match=r"ledger/data\.mdb is damaged: .*--run-dir"):
        LmdbStore(path)
    (path / "data.mdb").unlink()
    for opened in (LmdbStore, lambda path: snapshot(path).__enter__()):
        with pytest.raises(LedgerCorrupt, match="it is missing"):
            opened(path)


def test_a_creation_that_was_cut_short_begins_again(tmp_path: Path) -> None:
    (tmp_path / "ledger" / "new").mkdir(parents=True)
    (tmp_path / "ledger" / "new" / "data.mdb").write_bytes(b"half")
    assert write(tmp_path / "ledger", 2) and not (tmp_path / "ledger" / "new").exists()


def test_a_ledger_that_somebody_writes_to_is_read_without_a_check(tmp_path: Path) -> None:
    """Its pages change under the one who looks. Who writes has checked the file."""
    reader = "import sys; from pathlib import Path; from async_rl.ledger import store\n"
    reader += "store.check_file = None\nwith store.snapshot(Path(sys.argv[1])) as s: print(s.get(b'a'))"

    def look() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", reader, str(tmp_path)], capture_output=True, text=True)

    async def main() -> None:
        store = LmdbStore(tmp_path)
        await store.commit({b"a": b"1"})
        done = look()
        assert done.stdout == "b'1'\n", done.stderr
        await store.close()
        assert "'NoneType' object is not callable" in look().stderr, "at rest it is checked"

    asyncio.run(main())


def test_everyone_who_waits_hears_of_a_commit_that_failed(tmp_path: Path) -> None:
    """A file-size limit stands for a full disk. Nothing is committed after it, even if it would fit."""

    async def main() -> None:
        store = LmdbStore(tmp_path / "ledger")
        ledger = await Ledger.open(store)
        ledger.admit(Task("t", {"x": "y" * (1 << 20)}), 2, 0)
        waiting = [asyncio.create_task(ledger.committed()) for _ in range(5)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, UserError) for error in found), found
        assert f"ledger {tmp_path / 'ledger'}: " in str(found[0]) and "start again with the same command" in str(
            found[0]
        )
        with pytest.raises(UserError):
            await store.commit({b"small": b""})
        await store.close()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        asyncio.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    async def again() -> None:
        ledger = await Ledger.open(LmdbStore(tmp_path / "ledger"))
        assert ledger.run.epoch == 2 and not ledger.groups
        await ledger.close()

    asyncio.run(again())


def test_reading_while_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.ledger.store.INITIAL_MAP_BYTES", 1 << 20)

    async def main() -> None:
        store = LmdbStore(tmp_path)
        await store.commit({b"k/%03d" % n: b"v" * 100 for n in range(500)})
        growing = asyncio.create_task(store.commit({b"big/%03d" % n: b"x" * (1 << 18) for n in range(40)}))
        while not growing.done():
            assert sum(1 for _ in store.scan(b"k/")) == 500
            await asyncio.sleep(0)
        await growing
        await store.close()

    asyncio.run(main())
