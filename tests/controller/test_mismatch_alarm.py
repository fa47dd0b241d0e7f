"""When the alarm about engine and learner begins, and when it is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from schedules import recipe
from wires import Wires

from async_rl.controller.alarms import Alarms

AGREED, APART = (1e-6, 1e-11), (0.02, 1e-3)


def heard(*steps: tuple[float, tuple[float, float]] | None, **sections: Any) -> list[int]:
    """Steps at which something was said. Each step: tokens at equal version, (gap, k3); None where there are none."""
    said: list[str] = []
    alarms = Alarms(recipe(**sections), said.append)
    at: list[int] = []
    for number, step in enumerate(steps):
        metrics = {"equal_version_tokens": 0.0}
        if step is not None:
            tokens, (gap, k3) = step
            metrics = {"equal_version_tokens": tokens, "equal_version_gap": gap, "equal_version_k3": k3}
        alarms.trained(number, metrics)
        at += [number] * (len(said) - len(at))
    return at


def test_it_takes_three_in_a_row_and_speaks_once() -> None:
    wrong, right = (500.0, APART), (500.0, AGREED)
    assert heard(wrong, wrong, right, wrong, wrong, right) == []
    assert heard(wrong, wrong, wrong, wrong, wrong) == [2]
    assert heard(wrong, None, wrong, None, None, wrong, None, right, right, wrong, wrong, wrong) == [5, 7, 11]
    assert heard(None, None, None) == []


def test_few_tokens_are_taken_together() -> None:
    assert heard(*[(100.0, APART)] * 8) == []
    assert heard(*[(100.0, APART)] * 9) == [8], "three times three of them are 256 tokens or more"
    assert heard(*[(1.0, (0.1, 5e-3)), (999.0, AGREED)] * 3) == [], "one token of a thousand"


@pytest.mark.parametrize(
    ("gap", "k3", "alarm"), [(2e-3, 0.0, True), (0.0, 2e-5, True), (9e-4, 9e-6, False), (float("nan"), 0.0, True)]
)
def test_limits_of_float32(gap: float, k3: float, alarm: bool) -> None:
    assert bool(heard(*[(500.0, (gap, k3))] * 3)) is alarm


@pytest.mark.parametrize("role", ["generator", "learner"])
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_rounding_to_bfloat16_is_no_alarm(role: str, dtype: str) -> None:
    assert heard(*[(500.0, (0.04, 2e-3))] * 3, **{role: {"dtype": dtype}}) == []
    assert heard(*[(500.0, (0.07, 2e-3))] * 3, **{role: {"dtype": dtype}}) == [2]


def test_the_limit_is_of_what_auto_turned_out_to_be() -> None:
    """Of every process: one generator that computes in bfloat16 is enough."""
    auto = {"dtype": "auto"}
    alarms = Alarms(recipe(generator=auto, learner=auto), lambda _: None)
    assert alarms.mismatch_limit == 0.06, "it may be bfloat16"
    alarms.computes("learner", "learner", "float32")
    alarms.computes("generator", "generator-0", "float32")
    assert alarms.mismatch_limit == 1e-3
    alarms.computes("generator", "generator-1", "bfloat16")
    assert alarms.mismatch_limit == 0.06
    alarms.computes("generator", "generator-1", "float32")
    assert alarms.mismatch_limit == 1e-3, "it came back on another machine"
    alarms.computes("learner", "learner", "")
    assert alarms.mismatch_limit == 1e-3


@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [(("", "", ""), 0.06), (("float32",) * 3, 1e-3), (("float32", "float32", "bfloat16"), 0.06)],
)
def test_everybody_says_so_in_its_hello(virtual: Callable[[Any], Any], dtypes: tuple[str, ...], limit: float) -> None:
    async def main() -> None:
        auto = {"dtype": "auto"}
        wires = await Wires.open(dtypes=dtypes, generator={"count": 2} | auto, learner=auto)
        assert wires.controller._alarms.mismatch_limit == limit
        await wires.close()

    virtual(main())
