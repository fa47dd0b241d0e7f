"""Imports point one way, and the control plane stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "async_rl"
TORCH_FREE = [
    "async_rl",
    "async_rl.batching.plan",
    "async_rl.batching.selection",
    "async_rl.cli",
    "async_rl.config",
    "async_rl.recipes",
    "async_rl.controller.admin",
    "async_rl.controller.controller",
    "async_rl.engines.fake",
    "async_rl.engines.sglang.client",
    "async_rl.engines.sglang.contract",
    "async_rl.doctor.examine",
    "async_rl.environments.code",
    "async_rl.environments.gymnasium",
    "async_rl.environments.math",
    "async_rl.environments.reasoning_gym",
    "async_rl.environments.sorting",
    "async_rl.launch.cluster",
    "async_rl.launch.local",
    "async_rl.layout",
    "async_rl.ledger.inspection",
    "async_rl.rewards",
    "async_rl.rollout.worker",
    "async_rl.services.controller",
    "async_rl.simulate.virtual_loop",
    "async_rl.stages.estimates",
    "async_rl.staleness.guard",
    "async_rl.tasks.curriculum",
    "async_rl.tasks.source",
    "async_rl.telemetry.browser",
    "async_rl.telemetry.live_view",
    "async_rl.telemetry.report",
    "async_rl.telemetry.run_directory",
    "async_rl.wire.zeromq",
]
FORBIDDEN = [
    ("learner", "engines"),
    ("engines", "learner"),
    ("weights", "learner"),
    ("wire", "controller"),
    ("ledger", "controller"),
    ("telemetry", "controller"),
    ("algorithms", "learner"),
    ("algorithms", "wire"),
    *(("rewards", room) for room in ("controller", "rollout", "engines", "learner", "launch")),
    ("models", "engines"),
    ("models", "learner"),
    ("stages", "doctor"),
    *(
        (room, top)
        for room in ("learner", "engines", "rollout", "controller", "weights")
        for top in ("stages", "doctor")
    ),
]
"""(room, room it never imports); engines.protocol, the seam, is everybody's."""


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("room", "never"), FORBIDDEN)
def test_rooms_do_not_import_upwards(room: str, never: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        seen = {name for name in imports(path) if name.startswith(f"async_rl.{never}")}
        seen -= {name for name in seen if name.startswith("async_rl.engines.protocol") or name == "async_rl.engines"}
        assert not seen, f"{path.relative_to(ROOT)} imports {sorted(seen)}"


def test_nothing_imports_the_services() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        assert not {name for name in imports(path) if name.startswith("async_rl.services")}, path


def test_the_library_does_not_import_the_launchers() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("async_rl.launch")}, path


def test_torch_stays_out_of_the_control_plane() -> None:
    code = f"import sys, importlib\nfor name in {TORCH_FREE!r}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_every_package_is_shipped() -> None:
    import tomllib

    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    here = {
        f"async_rl.{path.parent.relative_to(PACKAGE)}".replace("/", ".") for path in PACKAGE.glob("*/**/__init__.py")
    }
    assert shipped == here | {"async_rl", "async_rl.services", "async_rl.launch"}
