"""What nearly repeats a held-out problem is not trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl import config
from async_rl.environments.api import find, make_tasks
from async_rl.errors import UserError
from async_rl.tasks.near_duplicates import SIMILAR, HeldOut, normalise

LONG = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May; how many in all?"
SHORT = "What is 17 * 23 + 4?"


@pytest.mark.parametrize(
    "text",
    [
        LONG.upper(),
        LONG.replace(" ", "  ").replace(";", ","),
        "So: "
        + " ".join(LONG.split()[:13])
        + " - and that is the end of a story that is another one altogether, is it not?",
        LONG.replace("Natalia", "Natalie").replace("how many", "count them"),
        r"What is $17 \, * 23 + 4$?",
    ],
)
def test_near(text: str) -> None:
    assert HeldOut(["Something else.", LONG, SHORT]).near(text)


@pytest.mark.parametrize("text", ["What is 17 * 23 - 4?", "What is 71 * 23 + 4?", "", "48", LONG[: len(LONG) // 2]])
def test_not_near(text: str) -> None:
    assert not HeldOut(["Something else.", LONG, SHORT]).near(text)


@given(st.lists(st.text("ab c", max_size=24), min_size=1, max_size=8), st.text("ab c", max_size=24), st.integers(0, 23))
def test_the_index_finds_what_comparing_all_finds(heldout: list[str], text: str, at: int) -> None:
    def pieces(text: str) -> set[str]:
        normal = normalise(text)
        return {normal[i : i + 5] for i in range(max(1, len(normal) - 4))}

    one = pieces(text)
    heldout = [*heldout, text[:at] + "a" + text[at:]]
    expected = any(len(one & pieces(other)) >= SIMILAR * len(one | pieces(other)) for other in heldout)
    assert HeldOut(heldout).near(text) == expected


def test_an_environment_leaves_them_out_and_says_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"What is {n} * {n + 7}?", "answer": n * (n + 7), "difficulty": 0.5} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "what is 3*10", "answer": 30}) + "\n")
    template = "{prompt} Think about it step by step, for as long as you like, and put the answer in a box at the end."
    options = {"data": str(tmp_path / "train.jsonl"), "heldout_data": str(tmp_path / "heldout.jsonl")}
    options["template"] = template
    environment = find(config.Environment(name="math"))
    source = make_tasks(environment, options, 1)
    assert source.num_problems == 20 and source.problem(0, 0)["difficulty"] == 0.5  # type: ignore[attr-defined]
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": "WHAT is 3 * 10", "answer": 30}) + "\n")
    with caplog.at_level(logging.WARNING):
        source = make_tasks(environment, {**options, "decontaminate": True}, 1)
    asked = {source.train(index)["messages"][0]["content"] for index in range(19)}
    assert len(asked) == 19 and template.format(prompt="What is 3 * 10?") not in asked
    assert "1 of 20 problems nearly repeat a held-out one and are left out" in caplog.text
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[3]))
    with pytest.raises(UserError, match="decontaminate = true: every problem of data"):
        make_tasks(environment, {**options, "decontaminate": True}, 1)
