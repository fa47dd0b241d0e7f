"""Whether there is a SGLang to start (tests/sglang has a real one)."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest

from async_rl.config import SGLang
from async_rl.engines.sglang.contract import TESTED
from async_rl.engines.sglang.installation import python_of
from async_rl.errors import UserError

PINNED = Path(__file__).resolve().parents[1] / "sglang" / "requirements.txt"


def test_a_python_without_sglang_is_named(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    says = rf"generator.sglang.python = '{python}': SGLang is not installed there \(No module named 'sglang'\); install"
    with pytest.raises(UserError, match=says):
        python_of(SGLang(python=str(python)))
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    assert python_of(SGLang(python=str(python), environment={"PYTHONPATH": str(tmp_path)})) == str(python)


@pytest.mark.parametrize("what", ["nowhere", "directory", "plain.txt"])
def test_what_is_no_program_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "plain.txt").write_text("")
    with pytest.raises(UserError, match=rf"generator.sglang.python = '{tmp_path / what}': there is no such program"):
        python_of(SGLang(python=str(tmp_path / what)))


def test_what_is_no_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"\0")
    (tmp_path / "program").chmod(0o755)
    with pytest.raises(UserError, match=r"program': this is no Python \(.*Exec format error"):
        python_of(SGLang(python=str(tmp_path / "program")))
    says = r"SGLang is not installed there \(exit code 1\)"
    with pytest.raises(UserError, match=says):
        python_of(SGLang(python="/bin/false"))


def test_one_version_is_meant_everywhere() -> None:
    assert f"sglang=={TESTED}\n" in PINNED.read_text()
