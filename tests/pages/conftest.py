"""Pages seen by a real browser, metrics read by a real Prometheus: Debian's packages chromium and prometheus."""

from __future__ import annotations

import shutil

import pytest

from tests.system.conftest import cli, train  # noqa: F401, fixtures

PROGRAMS = ("chromium", "prometheus", "promtool")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise pytest.UsageError(f"not installed: {', '.join(missing)} (apt-get install chromium prometheus)")
