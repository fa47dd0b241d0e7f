"""Engines over the tests' servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_cases import VOCABULARY, configs

from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.settings import Settings
from async_rl.models.parameters import Layout

CONTEXT = 256


def make_engine(
    scratch: Path,
    *,
    attach: Sequence[str] = (),
    slots: int = 8,
    vocabulary: int = VOCABULARY,
    max_length: int = 0,
    **settings: Any,
) -> SGLangEngine:
    """For the `llama` of engine_cases. It hears of every token, so that what a swap says of positions is exact."""
    settings = {"stream_tokens": 1, "scratch": scratch / "weights", "log": scratch / "log"} | settings
    return SGLangEngine(
        Settings(attach=attach, **settings),
        slots=slots,
        vocabulary=vocabulary,
        context=CONTEXT,
        max_length=max_length,
        shapes={entry.name: entry.shape for entry in Layout.of(configs()["llama"]).entries},
    )
