"""The Python that starts a SGLang server: is it there, and has it SGLang? Asked before a server takes time to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from async_rl.config import SGLang
from async_rl.engines.sglang.contract import TESTED
from async_rl.errors import UserError

HAS_SGLANG = "import importlib.util as u, sys; u.find_spec('sglang') or sys.exit(\"No module named 'sglang'\")"
ANSWER_S = 60.0


def python_of(server: SGLang) -> str:
    """Its path.

    Raises:
        UserError: there is none, or none that has SGLang.
    """
    python = server.python or sys.executable
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise UserError(
            f"generator.sglang.python = {python!r}: there is no such program; write the path of the Python that SGLang "
            "is installed in, such as /opt/sglang/bin/python"
        )
    environment = os.environ | server.environment
    try:
        asked = subprocess.run(
            [python, "-c", HAS_SGLANG], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"generator.sglang.python = {python!r}: this is no Python ({error}); write the path of one that has SGLang"
        ) from None
    if asked.returncode:
        said = asked.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {asked.returncode}"]
        raise UserError(
            f"generator.sglang.python = {python!r}: SGLang is not installed there ({said[-1]}); install it into an "
            f"environment of its own (pip install sglang=={TESTED}) and write the path of its Python (docs/sglang.md)"
        )
    return python
