"""A machine that can isolate programs, or the reason why it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

NOBODY = 61_000


@pytest.fixture(scope="session")
def bwrap() -> str:
    """The program. A missing one is a missing part; a kernel that forbids namespaces to ordinary users is not."""
    found = shutil.which("bwrap")
    if found is None:
        pytest.skip("bubblewrap is not installed")
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [
        found,
        "--unshare-all",
        "--unshare-user",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "true",
    ]
    tried = subprocess.run(command, capture_output=True, text=True, cwd="/", **user)
    if tried.returncode:
        pytest.skip(f"not permitted here: {tried.stderr.strip()}")
    return found
