"""Which commit a figure is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Of this checkout, which may be a copy without its git: then the environment says it, or nobody."""
    said = os.environ.get("ASYNC_RL_COMMIT", "")
    if said:
        return said
    ask = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
