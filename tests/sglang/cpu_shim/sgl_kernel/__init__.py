"""Names that SGLang imports from its kernel package when it is told to run on a CPU. None is called for a dense model
without speculative decoding on a CPU without AMX: whoever does call one learns which it was."""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> object:
    if name.startswith("__") or not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (of the tests) has no {name}")

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} was called: the tests' stand-in computes nothing")

    return missing
