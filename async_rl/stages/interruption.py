"""Ctrl-C as a question that is asked between two micro-batches, not as an exception in the middle of one."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager

PATIENCE = 3
"""Signals after which no orderly end is waited for. torchrun passes on a Ctrl-C that the terminal has delivered too."""


@contextmanager
def interruptible() -> Generator[Callable[[], bool]]:
    """Yields whether someone asked to stop (SIGINT, SIGTERM, SIGHUP) since. Only the main thread hears signals."""
    heard = 0

    def hear(number: int, frame: types.FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard >= PATIENCE:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield lambda: heard > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
