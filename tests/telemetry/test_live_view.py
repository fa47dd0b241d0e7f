"""Frames of the live view at several widths, and a real (pseudo) terminal that gets its cursor back."""

from __future__ import annotations

import doctest
import errno
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from async_rl import config, recipes
from async_rl.telemetry import live_view
from async_rl.telemetry.live_view import ASCII, UNICODE, View, bar, glyphs, sparkline
from async_rl.telemetry.run_directory import RunDirectory

WIDTHS = (60, 80, 120, 200)
TABLE: dict[str, Any] = {
    "steps": 40,
    "model": {"tiny": {"characters": "0123456789="}},
    "environment": {"name": "sorting"},
    "rollout": {"groups_per_step": 8, "group_size": 4},
}
RUN = recipes.from_table(TABLE)
ROW: dict[str, Any] = {
    "reward": 0.79736328125,
    "entropy": 0.4620718746627559,
    "ess_frac": 0.9801964521414982,
    "step": 250,
    "version": 251,
    "wall_s": 39.54782123100085,
    "train_exact": 0.54296875,
    "tokens": 2027,
    "tokens_per_cpu_s": 14564.913281688001,
    "tokens_per_s": {"generator": 12684.739181689918, "learner": 12768.492111322423},
    "busy": {"learner": 0.9540230282514278, "generator": 0.3457185566229121},
    "idle": {
        "learner": {"checkpoint": 0.00335, "hand_over": 0.0075, "publish": 0.0038, "wait_batch": 0.0313},
        "generator": {"environment": 0.2295, "wait_lease": 0.3752, "wait_weights": 0.0496},
    },
    "lag": {"mean": 1.0, "p95": 1, "max": 1, "tokens": {"1": 2027}},
    "masked_fraction": 0.0,
    "ready": 0,
    "running": 512,
}
"""Recorded from recipes/sort.toml, without the keys that the view does not read."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(version: int, **changes: Any) -> dict[str, Any]:
    """A step of 5 s; the reward rises by 0.02 each."""
    reward, exact = 0.02 * version, 0.01 * version
    base = {"step": version - 1, "version": version, "wall_s": 5.0 * version, "reward": reward, "train_exact": exact}
    return {**ROW, **base, **changes}


def evaluation(version: int, exact: float, failed: int = 0) -> dict[str, Any]:
    metrics = {"exact": exact}
    return {"version": version, "tasks": 30, "failed": failed, "reward": 0.5, "metrics": metrics, "tokens": 120}


def pulse(stage: str, done: int = 0, total: int = 0, *, ready: int = 0, version: int = 0) -> dict[str, Any]:
    return {"stage": stage, "done": done, "total": total, "ready": ready, "running": 12, "version": version}


def a_view(path: Path, run: config.Run = RUN, *, steps: int = 0, **options: Any) -> View:
    view = View(run, RunDirectory(path / "run"), "sort", **options)
    for version in range(1, steps + 1):
        view.watch("step", row(version))
    return view


def frame(view: View, width: int, height: int = 50) -> list[str]:
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(view)
    lines = console.export_text().rstrip("\n").split("\n")
    assert all(len(line) <= width for line in lines), "wrapped"
    return [line.rstrip() for line in lines]


def line_with(lines: list[str], word: str) -> str:
    (found,) = [line for line in lines if word in line]
    return found


def lags_of(lines: list[str]) -> list[list[str]]:
    """The words of each row of the lag histogram."""
    start = next(i for i, line in enumerate(lines) if "lag of tokens" in line)
    column = lines[start].index("lag of tokens")
    return [words for line in lines[start + 1 : start + 7] if (words := line[column:].split())]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_has_the_figures_at_every_width(tmp_path: Path, width: int) -> None:
    clock = Clock()
    view = a_view(tmp_path, steps=10, clock=clock)
    view.watch("evaluation", evaluation(0, 1 / 3))
    view.watch("evaluation", evaluation(10, 0.8133, failed=2))
    view.watch("pulse", pulse("training", 20, 32, ready=20, version=10))
    clock.now = 83.0
    lines = frame(view, width)
    assert len(lines) <= 20
    assert lines[0].startswith("sort  ") and lines[0].endswith("1:23 elapsed, about 2:25 left")
    assert lines[1] == "step 11 of 40: 20 of 32 rollouts ready"
    assert lines[2] == "━" * (width // 4) + "─" * (width - width // 4)
    assert line_with(lines, "reward  ") == "reward            0.040 ->   0.180  ▁▁▂▃▄▅▆▇██"
    assert line_with(lines, "exact match") == "exact match       0.020 ->   0.090  ▁▁▁▁▁▁▁▁▁▁"
    assert "0.333 ->   0.813" in line_with(lines, "held-out exact")
    assert line_with(lines, "held-out exact").endswith(", 2 failed")
    assert "0.462 ->   0.462" in line_with(lines, "entropy")
    assert "35 % busy    12.7k tokens/s" in line_with(lines, "generator")
    assert "95 % busy    12.8k tokens/s" in line_with(lines, "learner")
    assert "38 %  admission closed (staleness bound)" in line_with(lines, "admission")
    assert "3 %  waits for a batch" in line_with(lines, "waits for a batch")
    assert "98 %   rollouts: 20 ready, 12 running" in lines[-2]
    assert lines[-1] == "Ctrl-C stops, the same command continues"
    assert not any("…" in line for line in lines[1:])


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_not_known_yet_is_no_number(tmp_path: Path, width: int) -> None:
    lines = frame(a_view(tmp_path, clock=Clock()), width)
    assert lines[0].endswith("0:00 elapsed, - left") and lines[1] == "loading the model"
    for label in ("reward", "exact match", "held-out"):
        assert line_with(lines, label).split() == [*label.split(), "-", "->", "-"]
    assert "- busy        - tokens/s" in line_with(lines, "generator")
    assert [words[1] for words in lags_of(lines)] == ["-"] * 6
    assert "rollouts: - ready, - running" in lines[-2]
    assert not re.search(r"[0-9]", "\n".join(lines[1:7])), "nothing was measured"


def test_the_dashboards_address_is_there_while_it_answers(tmp_path: Path) -> None:
    view = a_view(tmp_path)
    view.watch("dashboard", "http://127.0.0.1:9470")
    assert frame(view, 80)[-1] == "Ctrl-C stops, the same command continues   http://127.0.0.1:9470"
    view.end("stopped")
    assert frame(view, 80)[-1] == "the same command continues"


def test_rows_of_an_older_run_may_lack_what_is_newer(tmp_path: Path) -> None:
    view = a_view(tmp_path)
    old = {name: value for name, value in row(1).items() if name not in ("tokens_per_s", "entropy", "train_exact")}
    view.watch("step", {**old, "lag": {"mean": 1.0, "p95": 1, "max": 1}, "busy": {}, "idle": {}, "kl_k3": 0.0002})
    lines = frame(view, 80)
    assert "- busy        - tokens/s" in line_with(lines, "learner")
    assert not any(word in line for line in lines for word in ("exact match", "entropy"))
    assert "2e-04" in line_with(lines, "KL to reference")
    assert line_with(lines, ">4").endswith(" - masked")


def test_tokens_over_the_bound_are_red_and_called_masked(tmp_path: Path) -> None:
    view = a_view(tmp_path)
    view.watch("step", row(1, lag={"mean": 1, "p95": 2, "max": 2, "tokens": {"0": 500, "2": 480, "5": 15, "9": 5}}))
    lines = frame(view, 80)
    assert line_with(lines, "   0 █").endswith(" 50 %")
    assert line_with(lines, "   2 █").endswith(" 48 %")
    assert line_with(lines, ">4 ▍").endswith(" 2 % masked")
    red = [line.plain for line in view.lines(80) if any(span.style == "bold red" for span in line.spans)]
    assert len(red) == 1 and ">4 ▍" in red[0]
    calm = a_view(tmp_path, steps=1)
    assert not any(span.style == "bold red" for line in calm.lines(80) for span in line.spans)


@pytest.mark.parametrize(
    ("bound", "labels"),
    [
        (0, ["0", ">0"]),
        (2, ["0", "1", "2", ">2"]),
        (4, ["0", "1", "2", "3", "4", ">4"]),
        (5, ["0-1", "2-3", "4-5", ">5"]),
        (16, ["0-3", "4-7", "8-11", "12-15", "16", ">16"]),
    ],
)
def test_every_lag_up_to_the_bound_has_a_place(tmp_path: Path, bound: int, labels: list[str]) -> None:
    run = recipes.from_table({**TABLE, "staleness": {"max_staleness": bound}})
    view = a_view(tmp_path, run)
    tokens = {str(lag): 1 for lag in range(bound + 2)}
    view.watch("step", row(1, lag={"mean": 1, "p95": 2, "max": 2, "tokens": tokens}))
    assert [words[0] for words in lags_of(frame(view, 80))] == labels
    for width in WIDTHS:
        assert not any("…" in line for line in frame(view, width)[1:])


def test_stages_follow_the_pulse_and_newer_steps(tmp_path: Path) -> None:
    view = a_view(tmp_path)
    view.watch("pulse", pulse("evaluation", 12, 30))
    assert frame(view, 80)[1] == "evaluating the start: 12 of 30 tasks"
    view.watch("pulse", pulse("training", 8, 32, ready=8))
    assert frame(view, 80)[1] == "step 1 of 40: 8 of 32 rollouts ready"
    view.watch("step", row(3))
    assert frame(view, 80)[1] == "step 4 of 40: 8 of 32 rollouts ready"
    view.watch("pulse", pulse("saving", version=3))
    assert frame(view, 80)[1] == "saving the last checkpoint"


def test_a_learner_that_starts_again_takes_its_steps_back(tmp_path: Path) -> None:
    view = a_view(tmp_path, steps=10)
    view.watch("step", row(4, reward=9.0))
    assert line_with(frame(view, 80), "reward  ").endswith("▁▁▁█")


def test_a_continued_run_begins_with_its_rows(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create(RUN)
    directory.metrics.write_text("".join(json.dumps(row(version)) + "\n" for version in range(1, 31)))
    directory.evaluations.write_text(json.dumps(evaluation(0, 0.25)) + "\n")
    lines = frame(View(RUN, directory, clock=Clock()), 80)
    assert lines[0].endswith("0:00 elapsed, about 0:50 left") and lines[2].count("━") == 60
    assert "0.040 ->   0.580" in line_with(lines, "reward  ")
    assert "0.250 ->       -" in line_with(lines, "held-out exact")


def test_the_time_left_counts_down_within_a_step(tmp_path: Path) -> None:
    clock = Clock()
    view = a_view(tmp_path, steps=38, clock=clock)
    left: list[str] = []
    for clock.now in (0.0, 3.0, 60.0):
        left.append(frame(view, 80)[0].partition("about ")[2])
    assert left == ["0:10 left", "0:07 left", "0:05 left"], "a late step does not eat the next one's time"
    view.watch("step", row(40))
    assert frame(view, 80)[0].endswith("1:00 elapsed")


def test_messages_are_the_last_lines_and_older_ones_are_given_back(tmp_path: Path) -> None:
    clock = Clock()
    view = a_view(tmp_path, clock=clock)
    given = [view.watch("say", f"generator-{i} died\x1b[2J\r\n(SIGKILL): " + "x" * 100) for i in range(3)]
    assert [[text.plain[:18] for text in each] for each in given] == [[], [], ["0:00  generator-0 "]]
    lines = frame(view, 80)
    assert [line[:18] for line in lines[-2:]] == ["0:00  generator-1 ", "0:00  generator-2 "]
    assert "\x1b" not in lines[-1] and lines[-1].endswith("x…") and len(given[2][0].plain) > 100


def test_a_low_terminal_keeps_the_edges_and_the_last_frame_has_everything(tmp_path: Path) -> None:
    view = a_view(tmp_path, steps=3)
    full = frame(view, 80)
    for height in (5, 10, 15):
        lines = frame(view, 80, height)
        assert len(lines) <= height and lines[0] == full[0] and lines[-1] == full[-1]
    view.end("stopped")
    assert len(frame(view, 80, 10)) == len(full)


@pytest.mark.parametrize("how", ["complete", "stopped", "failed"])
def test_the_last_frame_stands_still(tmp_path: Path, how: str) -> None:
    clock = Clock()
    view = a_view(tmp_path, steps=7, clock=clock)
    view.watch("pulse", pulse("saving", version=7))
    if how == "complete":
        view.watch("summary", {})
    clock.now = 61.0
    view.end(how)
    view.end("stopped")
    lines = frame(view, 80)
    clock.now = 99.0
    assert frame(view, 80) == lines and lines[0].endswith("1:01 elapsed")
    assert lines[1] == f"{how}: 7 of 40 steps"
    assert ("the same command continues" in lines) == (how == "stopped")


@pytest.mark.parametrize("width", WIDTHS)
def test_an_encoding_without_blocks_gets_ascii(tmp_path: Path, width: int) -> None:
    assert glyphs("utf-8") is UNICODE and glyphs("ascii") is ASCII and glyphs("latin-1") is ASCII
    view = a_view(tmp_path / ("long " * 40), steps=10, glyphs=ASCII)
    view.watch("say", "generator-0 died " + "x" * 300)
    text = "\n".join(frame(view, width))
    assert text.isascii() and "_.:-" in text.replace("__..::--==++**#", "_.:-") and "1 #" in text


def test_long_names_leave_room_for_the_times(tmp_path: Path) -> None:
    view = View(RUN, RunDirectory(tmp_path / ("数" * 40)), "n" * 100, clock=Clock())
    for width in WIDTHS:
        (first, *_) = view.lines(width)
        assert first.plain.endswith("0:00 elapsed, - left") and first.cell_len <= width


wild = st.one_of(st.floats(-1e100, 1e100), st.floats(0, 1), st.sampled_from([float("nan"), float("inf")]))


@given(reward=wild, exact=wild, rate=st.floats(0, 1e12), share=st.floats(0, 1), count=st.integers(0, 99_999))
def test_no_figure_is_ever_cut(
    tmp_path_factory: pytest.TempPathFactory, reward: float, exact: float, rate: float, share: float, count: int
) -> None:
    view = View(RUN, RunDirectory(Path("run")), "sort", clock=Clock())
    lag = {"mean": 1.0, "p95": 1, "max": 1, "tokens": {"0": count, "7": count}}
    view.watch("step", row(1, reward=reward, train_exact=exact, ess_frac=share, lag=lag, running=count, ready=count))
    rates, busy = {"generator": rate, "learner": rate}, {"generator": share, "learner": 1 - share}
    view.watch("step", row(2, reward=exact, tokens_per_s=rates, busy=busy, running=count, ready=count))
    view.watch("evaluation", evaluation(2, exact))
    for width in (*WIDTHS, 61, 79, 109):
        lines = frame(view, width)
        assert not any("…" in line for line in lines)


@given(st.lists(wild), st.integers(-3, 60), st.sampled_from([UNICODE.levels, ASCII.levels]))
def test_a_sparkline_fits_and_shows_every_value_there_is_room_for(values: list[float], width: int, levels: str) -> None:
    drawn = sparkline(values, width, levels)
    finite = [value for value in values if abs(value) < float("inf")]
    assert len(drawn) == max(0, min(width, len(finite))) and set(drawn) <= set(levels)


@given(st.floats(0, 2), st.integers(1, 60), st.sampled_from([UNICODE.eighths, ASCII.eighths]))
def test_a_bar_fits_and_is_never_nothing_for_something(share: float, width: int, eighths: str) -> None:
    assert (share > 0) <= len(bar(share, width, eighths)) <= width


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(live_view).failed == 0


# --- real terminals ---------------------------------------------------------------------------------------------------

PROGRAM = """
import json, signal, sys
from pathlib import Path
from async_rl import recipes
from async_rl.telemetry.live_view import viewer
from async_rl.telemetry.run_directory import RunDirectory

table, row, summary, how = json.loads(sys.argv[1])
try:
    with viewer(recipes.from_table(table), RunDirectory(Path(sys.argv[2])), name="sort", plain=how == "plain") as watch:
        watch("pulse", {"stage": "training", "done": 0, "total": 32, "ready": 0, "running": 32, "version": 0})
        watch("step", row)
        for i in range(3):
            watch("say", f"message {i} \\u6570")
        print("printed by somebody else")
        if how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        if how == "error":
            raise OSError("disk full")
        watch("summary", summary)
        watch("report", "runs/sort/report.html")
except KeyboardInterrupt:
    print("interrupted")
except OSError as error:
    print(error)
"""
SUMMARY = {"steps": 40, "wall_s": 201.34, "reward_first": 0.35, "reward_last": 0.79} | {
    "eval_before": {"reward": 0.3, "exact": 0.3333, "tasks": 30},
    "eval_after": {"reward": 0.8, "exact": 0.8133, "tasks": 30},
}
SENTENCE = "complete: 40 steps in 201.3 s, held-out greedy exact 0.333 -> 0.813 (30 tasks), reward 0.350 -> 0.790"
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def in_terminal(path: Path, how: str = "", *, width: int = 120, **environment: str) -> str:
    """What the program above writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    before = termios.tcgetattr(ours)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([TABLE, row(7), SUMMARY, how]), str(path / "run")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment(TERM="xterm-256color", PYTHONUTF8="1") | environment,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 1 << 16):
            written += part
    except OSError as error:
        assert error.errno == errno.EIO, "the other end was closed"
    assert child.wait() == 0, written.decode()
    assert termios.tcgetattr(ours) == before
    os.close(ours)
    return written.decode()


def clean_environment(**more: str) -> dict[str, str]:
    meant_for_terminals = re.compile(r"COLUMNS|LINES|TERM|NO_COLOR|FORCE_COLOR|TTY_.*|PYTHONIOENCODING|COLORTERM")
    return {name: value for name, value in os.environ.items() if not meant_for_terminals.fullmatch(name)} | more


def text_of(written: str) -> list[str]:
    """Its lines, in the order in which they were written; frames follow each other."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("how", ["", "ctrl-c", "error"])
def test_the_terminal_gets_its_cursor_back_and_keeps_the_last_frame(tmp_path: Path, how: str) -> None:
    written = in_terminal(tmp_path, how)
    assert written.count(HIDE) == written.count(SHOW) == 1 and written.index(HIDE) < written.index(SHOW)
    lines = text_of(written)
    last = max(i for i, line in enumerate(lines) if line.startswith("sort  "))
    frame, before = lines[last:], lines[:last]
    assert frame[1].split(":")[0] == {"": "complete", "ctrl-c": "stopped", "error": "failed"}[how]
    (at,) = [i for i, line in enumerate(frame) if "message 1 数" in line]
    assert "message 2 数" in frame[at + 1]
    after = {"": [SENTENCE, "report: runs/sort/report.html"], "ctrl-c": ["interrupted"], "error": ["disk full"]}
    assert frame[at + 2 :] == after[how]
    assert any("message 0" in line for line in before), "what leaves the view stays above it"
    assert any("printed by somebody else" in line for line in before)


def test_no_color_keeps_the_view_and_loses_the_colours(tmp_path: Path) -> None:
    colour = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|9[0-7])[;m]")
    assert colour.search(in_terminal(tmp_path))
    written = in_terminal(tmp_path, NO_COLOR="1")
    assert HIDE in written and not colour.search(written)


def test_a_terminal_without_the_characters_gets_ascii(tmp_path: Path) -> None:
    written = in_terminal(tmp_path, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert written.isascii() and "message 2 ?" in written and "=====" in written


PLAIN = [
    "training from step 1 of 40, 32 rollouts a step",
    "step  7/40    35.0 s  reward 0.140  exact 0.07",
    "message 0 数",
    "message 1 数",
    "message 2 数",
    "printed by somebody else",
    SENTENCE,
    "report: runs/sort/report.html",
]


@pytest.mark.parametrize(("how", "term"), [("plain", "xterm-256color"), ("", "dumb")])
def test_plain_lines_on_request_and_on_a_dumb_terminal(tmp_path: Path, how: str, term: str) -> None:
    written = in_terminal(tmp_path, how, TERM=term)
    assert "\x1b" not in written
    assert [line[: len(told)] for line, told in zip(text_of(written), PLAIN, strict=True)] == PLAIN


def test_a_pipe_gets_plain_lines_whatever_is_forced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps([TABLE, row(7), SUMMARY, ""]), str(tmp_path / "run")]
    env = clean_environment(TERM="xterm", FORCE_COLOR="1", TTY_INTERACTIVE="1", PYTHONUTF8="1")
    written = subprocess.run(command, stdout=subprocess.PIPE, env=env, check=True).stdout.decode()
    assert "\x1b" not in written and "\r" not in written
    assert [line[: len(told)] for line, told in zip(text_of(written), PLAIN, strict=True)] == PLAIN
