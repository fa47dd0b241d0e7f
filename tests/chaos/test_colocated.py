"""Learner and generator on one device: whoever holds it dies, in each state of the machine (controller/turns.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_rl.controller.turns import Turn

from ..system.conftest import check
from .faults import DeathsAt

ENGINE = ("generator-0", "async_rl.engines.embedded", "EmbeddedEngine")
OFFLOAD = ("learner-0", "async_rl.learner.offload", "Offload")
PLACES = {
    Turn.UPDATE: (*ENGINE, "load_weights"),
    Turn.ROLLOUT: (*ENGINE, "submit"),
    Turn.RELEASE: (*ENGINE, "release"),
    Turn.ONLOAD: (*OFFLOAD, "enter"),
    Turn.TRAIN: ("learner-0", "async_rl.learner.trainer", "Learner", "train"),
    Turn.OFFLOAD: (*OFFLOAD, "leave"),
}


@pytest.mark.timeout(300)
def test_a_death_in_every_state(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other one stays, the run goes on, and nothing is lost or trained twice."""
    assert set(PLACES) == set(Turn)
    deaths = DeathsAt(monkeypatch, tmp_path / "first", {turn.value: place for turn, place in PLACES.items()})
    run = start("steps=100000", "placement=colocated", "staleness.depth=1")
    run.rows(2)
    for turn, (victim, *_) in PLACES.items():
        others = {name: process.pid for name, process in run.children().items() if name != victim}
        deaths.order(turn.value)
        run.line(f"{victim} died (SIGKILL)")
        assert deaths.done(turn.value), turn
        run.rows(3)
        assert {name: process.pid for name, process in run.children().items() if name != victim} == others
    run.children()["controller"].kill()  # the device is then with whoever had it last
    run.line("controller died (SIGKILL)")
    run.rows(3)
    run.call("/stop", "POST")
    code, printed = run.end(60)
    assert code == 130, printed
    check(run.path)
