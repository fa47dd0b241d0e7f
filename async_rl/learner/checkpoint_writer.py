"""Checkpoints are written while training goes on: the step boundary pays for a copy in memory, a thread for the disk.

    writer = CheckpointWriter(run_directory / "checkpoints", run.checkpoint)
    saved = writer.begin(lambda: checkpoint.take(position, parts, tokenizer))
    ... train ...
    path = saved.result()            # durable

One is written at a time: `begin` waits for the one before, so that two copies never lie in memory.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from async_rl.config import Checkpoint
from async_rl.errors import UserError
from async_rl.learner.checkpoint import Content, prune, write

WRITE_TIMEOUT_S = 1800.0
"""So long may writing take beyond the next checkpoint's turn."""


class CheckpointWriter:
    """A thread. `begin` and `close` belong in one other thread at a time."""

    def __init__(self, directory: Path, config: Checkpoint) -> None:
        self._directory, self._config = directory, config
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def begin(self, take: Callable[[], Content]) -> Future[Path]:
        """Copy with `take()` once the former checkpoint is on disk, and write in the background.

        The future is done when the new one is durable; it raises UserError where the disk is full.

        Raises:
            UserError: the former one is still not written, or could not be.
        """
        self.wait()
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

    def close(self) -> None:
        """What is being written is finished."""
        self._thread.shutdown()

    def _write(self, content: Content) -> Path:
        path = write(self._directory, content)
        prune(self._directory, self._config.keep)
        return path
