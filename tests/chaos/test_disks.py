"""A full disk and damaged files: one line that names the file, nothing lost without a word."""

from __future__ import annotations

import random
import resource
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from ..system.conftest import SORT
from .conftest import Run, completes

DISK_BYTES = 12 << 20
PAGE, TRANSACTION = 4096, 16 + 128
"""LMDB: of a page; where a meta page holds its transaction."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A tmpfs of its own; None where none can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        yield None
        return
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass


def refused(run: Run, *says: str) -> None:
    """It ended with one line on stderr, and exit code 2."""
    code, printed = run.end(60)
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("async-rl: "), printed
    assert all(part in last for part in says), last
    assert "Traceback" not in printed


@pytest.mark.timeout(240)
def test_a_full_disk(start: Any, small_disk: Path | None, tmp_path: Path, rng: random.Random) -> None:
    """Where no disk can be mounted, a file-size limit of the controller stands for it."""
    run = start("steps=150", "controller.keep_rollouts=all", path=(small_disk or tmp_path) / "run")
    run.rows(rng.randrange(5, 60))
    if small_disk is None:
        resource.prlimit(run.children()["controller"].pid, resource.RLIMIT_FSIZE, (PAGE, PAGE))
        refused(run, str(run.path), "start again with the same command")
    else:
        fill(small_disk / "filler")
        refused(run, str(run.path), "No space left on device", "start again with the same command")
        run.start()
        refused(run, str(run.path), "No space left on device")
        (small_disk / "filler").unlink()
    run.start()
    run.line("continuing")
    completes(run, 150)


def truncate(data: Path, rng: random.Random) -> None:
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(rng.randrange(size // 2))


def flip_a_byte_of_a_record(data: Path, rng: random.Random) -> None:
    with lmdb.open(str(data.parent), readonly=True) as env, env.begin() as transaction:
        values = [value for key, value in transaction.cursor() if key.startswith((b"group/", b"task/", b"run"))]
    value, content = rng.choice(values), bytearray(data.read_bytes())
    at, byte, flip = -1, rng.randrange(len(value)), rng.randrange(1, 256)
    while (at := content.find(value, at + 1)) >= 0:  # also in pages that are free: which is which, LMDB knows
        content[at + byte] ^= flip
    data.write_bytes(content)


def damage_the_meta_page(data: Path, rng: random.Random) -> None:
    """The newer one: LMDB itself would go on from the older, without the last transaction."""
    content = bytearray(data.read_bytes())
    ids = [struct.unpack_from("<Q", content, page * PAGE + TRANSACTION)[0] for page in (0, 1)]
    page = ids.index(max(ids))
    struct.pack_into("<Q", content, page * PAGE + TRANSACTION, rng.choice([0, ids[page] - 2, ids[page] ^ 2]))
    data.write_bytes(content)


@pytest.mark.timeout(240)
def test_damaged_ledgers(start: Any, cli: Any, tmp_path: Path, rng: random.Random) -> None:
    run = start("steps=100000")
    run.rows(rng.randrange(12, 40))
    run.kill(["train"])
    run.end()
    for damage, says in (
        (truncate, "ledger/data.mdb is damaged"),
        (damage_the_meta_page, "ledger/data.mdb is damaged: "),
        (flip_a_byte_of_a_record, "record "),
    ):
        copy = tmp_path / damage.__name__
        shutil.copytree(run.path, copy)
        damage(copy / "ledger" / "data.mdb", rng)
        for command, exit_code in ((["inspect", str(copy), "--check"], 1), (["train", str(SORT)], 2)):
            more = [] if exit_code == 1 else ["--run-dir", str(copy), "--no-report", *run.sets]
            code, printed, errors = cli(*command, *more).end(60)
            assert code == exit_code and errors.startswith("async-rl: ") and says in errors, printed + errors
            assert errors.count("\n") == 1 and "--run-dir" in errors and str(copy) in errors, errors


@pytest.mark.timeout(180)
def test_two_trains_at_once(start: Any) -> None:
    """One of them works, for longer than the other waits; which then names it and refuses."""
    steps = 1500
    first = start(f"steps={steps}")
    second = start(f"steps={steps}", path=first.path)
    while first.process.process.poll() is None and second.process.process.poll() is None:
        first.closed.wait(0.1)
    refusing, working = (first, second) if first.process.process.poll() is not None else (second, first)
    controller = working.children()["controller"].pid
    refused(refusing, f"is in use by process {controller} (started by {working.process.process.pid})")
    completes(working, steps)
