"""Files that other programs read while they are written: whole lines, whole files, one line where the disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from async_rl.errors import UserError

Row = dict[str, Any]


@contextmanager
def room(path: Path) -> Generator[None]:
    """A full disk is nothing that a restart mends: one line that says which, exit code 2."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{path}: {error.strerror}: free some and start again with the same command") from None


def append_lines(path: Path, rows: Sequence[Row]) -> None:
    with room(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path: Path, value: object, mode: int = 0o666) -> None:
    write_atomically(path, json.dumps(value) + "\n", mode)


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """The old content or the new, never half of it. mode: of the new file, before the umask."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with room(path):
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drop_half_a_line(path: Path) -> None:
    """What a full disk cut short, so that the next line stands on its own."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
