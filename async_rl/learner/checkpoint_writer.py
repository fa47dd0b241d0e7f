"""Checkpoints are written while training goes on: the step boundary pays for a copy in memory, a thread for the disk.

    writer = CheckpointWriter(run_directory / "checkpoints", run.checkpoint, ranks, together=False)
    saved = writer.begin(version, lambda: checkpoint.take(position, parts, tokenizer, ranks))
    ... train ...
    path = saved.result()            # durable

One is written at a time: `begin` waits for the one before, so that two copies never lie in memory. Where ranks share
the parameters every rank has a writer, and the threads agree over a group of their own that all have written.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from async_rl.config import Checkpoint
from async_rl.errors import AsyncRLError, UserError
from async_rl.learner import checkpoint
from async_rl.learner.checkpoint import Content
from async_rl.learner.distributed import Ranks

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 1800.0
"""So long may writing take beyond the next checkpoint's turn, and one rank longer than another."""


class CheckpointIncomplete(AsyncRLError):
    """Another rank could not write its part; its own log says why. The former checkpoint is still there."""


class CheckpointWriter:
    """A thread. `begin` and `close` belong in one other thread at a time."""

    def __init__(self, directory: Path, config: Checkpoint, ranks: Ranks, *, together: bool) -> None:
        """together: every rank writes a part of each checkpoint; else rank 0 writes all of it."""
        self._directory, self._config, self._ranks = directory, config, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._rewards: dict[int, float] = {}
        self._others = ranks.separate(WRITE_TIMEOUT_S) if together else None

    def begin(self, version: int, take: Callable[[], Content]) -> Future[Path]:
        """Copy with `take()` once the former checkpoint is on disk, and write in the background. Rank 0 is the first
        to begin: it makes the directory.

        The future is done when the new one is durable, on other ranks when their part is written; it raises UserError
        where the disk is full.

        Raises:
            UserError: the former one is still not written, or could not be.
        """
        self.wait()
        if self._ranks.rank == 0:
            checkpoint.prepare(self._directory, version)
        content = take()
        self._writing = self._thread.submit(self._write, content)
        return self._writing

    def wait(self) -> None:
        """Until nothing is being written. Raises as `begin` does."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result(WRITE_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            raise UserError(
                f"checkpoint.every_steps = {self._config.every_steps}: the checkpoint before this one is not in "
                f"{self._directory} after {WRITE_TIMEOUT_S:.0f} s; write a higher number, or use a faster disk"
            ) from None

    def evaluated(self, version: int, reward: float) -> None:
        """Of a version that is saved, or may be soon. From any thread; what it means for old checkpoints shows when the
        next one is written."""
        self._rewards[version] = reward

    def close(self) -> None:
        """What is being written is finished."""
        self._thread.shutdown()

    def _write(self, content: Content) -> Path:
        version = content.position.version
        written = False
        try:
            checkpoint.write(self._directory, content, self._ranks)
            written = True
        except Exception:
            if self._ranks.rank > 0:  # rank 0 only hears that it failed
                log.exception("this rank could not write its part of checkpoint %d", version)
            raise
        finally:
            failed = self._others is not None and self._others.any(not written)
        if failed:
            raise CheckpointIncomplete(f"checkpoint {version}: another rank could not write its part: see its log")
        if self._ranks.rank > 0:
            return self._directory
        path = checkpoint.finish(self._directory, version)
        checkpoint.prune(self._directory, self._config.keep, self._spared())
        return path

    def _spared(self) -> set[int]:
        """The best, and those whose evaluation may still come."""
        rewards = self._rewards.copy()
        saved = [int(path.name[1:]) for path in checkpoint.checkpoints(self._directory)]
        return spared(saved, rewards, self._config.keep_best)


def spared(saved: Iterable[int], rewards: Mapping[int, float], keep_best: int) -> set[int]:
    """Versions that stay although they are not among the newest: of equal rewards the newer.

    >>> sorted(spared([2, 4, 6, 8, 10], {2: 0.5, 4: 0.75, 6: 0.75, 8: 0.25}, 1))
    [6, 10]
    """
    if not keep_best:
        return set()
    saved, newest = set(saved), max(rewards, default=-1)
    ranked = sorted(saved & rewards.keys(), key=lambda version: (rewards[version], version))
    return {*ranked[-keep_best:], *(version for version in saved if version > newest)}
