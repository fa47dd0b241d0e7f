"""Put before SGLang by PYTHONPATH, for tests on a CPU: what its wheel expects of packages that have no CPU build.

Nothing here computes. With this, the unmodified SGLang runs its own torch code paths:

torchvision  the registry's wheel is built for CUDA and cannot load its operators beside a CPU torch; transformers only
             needs it to be importable, and for that two operators must have a schema.
triton       a gigabyte that no CPU path calls. SGLang ships stand-ins of its modules for machines of Apple, and puts
             them in place where it finds one: for that moment this looks like one.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest import mock

TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[Any] = []
"""A torch library is undone when nobody holds it."""


class Before(MetaPathFinder):
    """Prepares for a package just before its first import."""

    def __init__(self, package: str, prepare: Callable[[], None]) -> None:
        self._package, self._prepare = package, prepare

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == self._package:
            sys.meta_path.remove(self)
            self._prepare()


def declare_torchvision() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in TORCHVISION_SCHEMAS:
        library.define(schema)
    kept.append(library)


def stand_in_for_triton() -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    import torch

    found = PathFinder.find_spec("sglang")
    assert found is not None and found.submodule_search_locations is not None
    stubs = Path(found.submodule_search_locations[0]) / "_platform_stubs.py"
    spec = importlib.util.spec_from_file_location("sglang_platform_stubs", stubs)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (
        mock.patch.object(sys, "platform", "darwin"),
        mock.patch.object(platform, "machine", return_value="arm64"),
        mock.patch.object(torch.backends.mps, "is_available", return_value=True),
    ):
        module.install_platform_stubs()


sys.meta_path[:0] = [Before("torchvision", declare_torchvision), Before("sglang", stand_in_for_triton)]
