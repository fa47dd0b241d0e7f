"""`async-rl inspect` on real ledgers: what a person sees, what a program reads, what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from async_rl import recipes
from async_rl.errors import UserError
from async_rl.ledger.ledger import Keep, Ledger
from async_rl.ledger.records import ProblemRecord, StepRecord
from async_rl.ledger.store import LmdbStore
from async_rl.telemetry.browser import LAST, find, show
from async_rl.telemetry.journal import EvalSummary, sample_row
from async_rl.telemetry.pages import (
    EvaluationPage,
    FailuresPage,
    GroupPage,
    Overview,
    Page,
    ProblemsPage,
    StepPage,
    clean,
    ranges,
)
from async_rl.telemetry.run_directory import DirectoryJournal, RunDirectory
from async_rl.wire.messages import RolloutResult, Task, VersionSpan
from async_rl.wire.messages import Sequence as Tokens

CHARACTERS = "0123456789=ab[/]m \n\x1b\x9b\r"
BOS, EOS = 1, 2
STEP = 5
"""The step of groups 0 and 1."""
Spans = Sequence[tuple[int, int, int, int]]


def ids(text: str) -> list[int]:
    """One token per character; ^ and $ are bos and eos."""
    return [BOS if c == "^" else EOS if c == "$" else 3 + CHARACTERS.index(c) for c in text]


def sequence(tokens: Sequence[int], spans: Spans) -> Tokens:
    logprobs = np.zeros(len(tokens), np.float32)
    for start, end, *_ in spans:
        logprobs[start:end] = -np.arange(1, end - start + 1) / 4
    return Tokens(np.array(tokens, np.int32).tobytes(), logprobs.tobytes(), [VersionSpan(*span) for span in spans])


def rollout(member: int, text: str, spans: Spans, reward: float = 0.5) -> RolloutResult:
    return RolloutResult(member, [sequence(ids(text), spans)], reward, {"sum": reward}, {"exact": reward // 1})


def make_run(path: Path, model: dict[str, Any], keep: Keep = "sample") -> RunDirectory:
    table = {"steps": 10, "model": model, "environment": {"name": "adding"}, "staleness": {"max_staleness": 2}}
    directory = RunDirectory(path)
    directory.create(recipes.from_table({**table, "controller": {"keep_rollouts": keep}}))
    return directory


async def fill(directory: RunDirectory, groups: int) -> None:
    """Trained on in step 5: 0 (a failed member, several versions in a completion), and 1, whose tokens go. Waiting: 2.
    Half scored: 3. Not scored: 4. Cancelled: 5."""
    ledger = await Ledger.open(LmdbStore(directory.ledger))
    for number in range(groups):
        ledger.admit(Task(f"train-{number}", {"sum": f"{number}+[bold]1"}), 3 if number == 0 else 2, 0)
    ledger.fail(0, 1, "ValueError: boom in request 7")
    mixed = rollout(0, "^12=3456 \x1b[m$", [(4, 6, 1, 1), (6, 8, 4, 4), (9, 13, 5, 4)])
    ledger.score(0, [mixed, rollout(2, "^12=3$", [(4, 6, 5, 5)], reward=1.0)])
    for group in (1, 2):
        ledger.score(group, [rollout(0, "^7=7$", [(3, 5, 5, 5)]), rollout(1, "^7=[/]$", [(3, 7, 5, 5)])])
    ledger.compose(StepRecord(STEP, [(0, [0, 2]), (1, [0, 1])], 14, 2, 1), [(0, [1])])
    await ledger.committed()
    ledger.trained(STEP)
    ledger.checkpoint(STEP + 1, keep=directory.load_config().controller.keep_rollouts)
    ledger.score(3, [rollout(1, "^9=9$", [(3, 5, 6, 6)])])
    ledger.cancel(ledger.groups[5], "stale")
    await ledger.close()


def row(step: int) -> dict[str, Any]:
    lag = {"mean": 0.5, "p95": 1, "max": 1}
    return {"step": step, "wall_s": step + 1.0, "reward": step / 10, "samples": 4, "tokens": 10, "lag": lag} | {
        "masked_fraction": 0.125,
        "tokens_per_cpu_s": 1.0,
    }


def journal(directory: RunDirectory) -> None:
    written = DirectoryJournal(directory, lambda kind, data: None)
    for step in range(STEP + 1):
        written.step(row(step))
    for version, rewards in ((0, [0.0, 0.25, 0.0]), (6, [0.5, 0.25, 1.0])):
        tasks = [Task(f"heldout-{i}", {"digits": str(i)}) for i in range(3)]
        results = [rollout(0, f"^{i}={version}$", [(3, 5, version, version)], r) for i, r in enumerate(rewards)]
        samples = [sample_row(version, task, result) for task, result in zip(tasks, results, strict=True)]
        summary = EvalSummary(version, 40, 1, sum(rewards) / 3, {"exact": rewards[2]}, 6)
        written.evaluated(summary, samples)
    written.failed(0, 1, "ValueError: boom in request 7", "Traceback\n  File x\nValueError: \x1b]0;title\x07 [red]")
    written.failed(9, 0, "ValueError: boom in request 8", "Traceback\nValueError: second")
    written.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = make_run(tmp_path_factory.mktemp("runs") / "run", {"tiny": {"characters": CHARACTERS}})
    asyncio.run(fill(directory, 6))
    journal(directory)
    return directory


def text(page: Page) -> str:
    """As in a pipe."""
    console = Console(file=io.StringIO(), width=10_000, highlight=False, markup=False, emoji=False)
    show(page, console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in printed
    return printed


def coloured(page: Page, monkeypatch: pytest.MonkeyPatch, *, height: int = 100) -> str:
    """As on a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    show(page, console=Console(file=file, force_terminal=True, color_system="standard", width=100, height=height))
    return file.getvalue()


def test_the_overview_says_what_happened_and_how_to_go_on(run: RunDirectory) -> None:
    page = find(run)
    assert isinstance(page, Overview)
    lines = text(page).splitlines()
    assert lines[0] == f"{run.path}: adding, 6 of 10 steps"
    assert lines[1] == "reward 0.100 -> 0.400, 6.0 s", "means of three steps, as in the summary"
    assert "mean 0.50, oldest 1 of 2 allowed; 12.5% of the tokens masked" in lines[2]
    assert [line.split() for line in lines[4:7]] == [
        ["version", "tasks", "failed", "reward", "exact", "tokens"],
        ["0", "40", "1", "0.083", "0.000", "6"],
        ["6", "40", "1", "0.583", "1.000", "6"],
    ]
    assert "rollouts: admitted 13, trained 4, failed 1, cancelled 2, running 3, scored 1, ready 2" in lines
    assert "  failed 1: ValueError: boom in request 7" in lines and "  cancelled 2: stale" in lines
    assert "groups to read: 1 trained, of steps 5" in lines
    assert "groups to read: 1 ready, in no step yet: 2" in lines
    assert "groups to read: 1 scored, in no step yet: 3" in lines
    commands = [line.split("  ")[0] for line in lines if line.startswith("async-rl inspect")]
    options = ["--step 5", "--group 0", "--eval --worst 3", "--failures", "--check"]
    assert commands == [f"async-rl inspect {run.path} {option}" for option in options]


def test_an_overview_before_anything_happened(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a run", {"tiny": {"characters": CHARACTERS}})
    with pytest.raises(UserError, match="there is no ledger; write the path of a run directory whose run has begun"):
        find(directory)
    asyncio.run(fill_nothing(directory))
    printed = text(find(directory))
    assert "0 of 10 steps" in printed and "groups to read: none" in printed
    assert f"async-rl inspect '{directory.path}' --check" in printed and "--step" not in printed


async def fill_nothing(directory: RunDirectory) -> None:
    await (await Ledger.open(LmdbStore(directory.ledger))).close()


def test_a_step_is_a_table_of_its_groups(run: RunDirectory) -> None:
    page = find(run, step=STEP)
    assert isinstance(page, StepPage) and page.gone == [1]
    (line,) = page.groups
    assert (line.group, line.task, line.rewards, line.tokens) == (0, "train-0", [0.5, 1.0], [8, 2])
    assert (line.lag, line.finish_reasons, line.metrics, line.failed) == ((0, 4), {"eos": 2}, {"exact": 0.5}, 1)
    printed = text(page).splitlines()
    assert printed[0] == "step 5, trained: 2 groups, 16 sampled tokens"
    assert printed[1] == "2 of them are over the bound of 2: weight 0"
    assert re.split(r"  +", printed[4].strip()) == [
        *("0", "0.750", "0.500..1.000", "0.50", "2..8", "0..4", "eos 2, failed 1", "train-0"),
    ]
    assert printed[-1].startswith("groups whose tokens are gone: 1 (controller.keep_rollouts")


def test_all_groups_of_a_step_are_there_if_all_are_kept(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", {"tiny": {"characters": CHARACTERS}}, keep="all")
    asyncio.run(fill(directory, 6))
    page = find(directory, step=STEP)
    assert isinstance(page, StepPage) and [line.group for line in page.groups] == [0, 1] and not page.gone


def test_versions_inside_a_completion_are_marked_where_there_are_no_colours(run: RunDirectory) -> None:
    page = find(run, group=0)
    assert isinstance(page, GroupPage) and (page.step, page.version) == (STEP, STEP)
    first, failed, last = page.members
    assert [(p.text, p.start, p.end, p.version, p.lag, p.masked) for p in first.sequences[0].completion] == [
        ("34", 4, 6, 1, 4, True),
        ("56", 6, 8, 4, 1, False),
        (" ", 8, 9, -1, None, False),
        ("\x1b[m<eos>", 9, 13, 5, 0, False),
    ]
    assert (first.tokens, first.lag, first.logprob_min) == (8, (0, 4), -1.0)
    assert first.logprob_mean == pytest.approx((-0.25 * 3 - 0.5 * 3 - 0.75 - 1.0) / 8)
    assert (failed.state, failed.reward, failed.sequences) == ("failed", None, []) and "File x" in failed.traceback
    assert last.reward == 1.0
    lines = text(page).splitlines()
    assert lines[0] == "group 0, step 5"
    assert lines[1] == 'task train-0  {"sum": "0+[bold]1"}'
    assert lines[2:6] == [
        "  not sampled by the policy, 1 tokens",
        "  v1 lag 4, 2 tokens, over the bound of 2: weight 0",
        "  v4 lag 1, 2 tokens",
        "  v5 lag 0, 6 tokens",
    ]
    del lines[2:5]
    assert lines[4:6] == ["prompt, 4 tokens:", "  <bos>12="], "once: all members have the same"
    assert lines.count("  <bos>12=") == 1
    assert lines[6].startswith("member 0: reward 0.500, sum 0.5, exact 0, eos, 8 tokens, lag 0..4, log-prob mean -0.5")
    assert lines[6].endswith("min -1.00, trained")
    assert lines[7] == "  ⟦v1 masked⟧34⟦v4⟧56⟦given⟧ ⟦v5⟧␛[m<eos>"
    assert lines[8] == "  4-6 v1 lag 4 masked, 6-8 v4 lag 1, 9-13 v5 lag 0 (cache v4)"
    assert lines[9] == "member 1: failed (ValueError: boom in request 7)" and "  ValueError: ␛]0;title␇ [red]" in lines
    assert "  ⟦v5⟧3<eos>" in lines


def test_versions_inside_a_completion_have_colours_on_a_terminal(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = find(run, group=0)
    printed = coloured(page, monkeypatch)
    cyan, magenta, yellow = 36, 35, 33
    assert f"\x1b[7;{cyan}m34\x1b[0m\x1b[{magenta}m56\x1b[0m\x1b[2m \x1b[0m\x1b[{yellow}m␛[m<eos>\x1b[0m" in printed
    assert f"\x1b[{magenta}mv4 lag 1, 2 tokens\x1b[0m" in printed, "the legend has the same colours"
    assert f"\x1b[{yellow}m3<eos>\x1b[0m" in printed, "and so have all members"
    assert "⟦" not in printed and "\x1b[m" not in printed and "\x07" not in printed
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦v4⟧56" in coloured(page, monkeypatch), "a terminal without colours has marks"


def test_members_one_by_one_and_groups_that_no_step_holds(run: RunDirectory) -> None:
    page = find(run, group=0, member=2)
    assert isinstance(page, GroupPage) and [member.member for member in page.members] == [2]
    ready = find(run, group=2)
    assert isinstance(ready, GroupPage) and (ready.step, ready.version) == (None, 6)
    printed = text(ready)
    assert "group 2, no step yet, lag at version 6" in printed and "v5 lag 1" in printed and "⟦v5⟧[/]<eos>" in printed
    half = find(run, group=3)
    assert isinstance(half, GroupPage) and [member.state for member in half.members] == ["running", "scored"]
    assert "member 0: running\n" in text(half)


def test_turns_with_different_prompts_show_each(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", {"tiny": {"characters": CHARACTERS}})

    async def main() -> None:
        ledger = await Ledger.open(LmdbStore(directory.ledger))
        ledger.admit(Task("t", {}), 1, 0)
        turns = [sequence(ids("^1=a$"), [(3, 5, 0, 0)]), sequence(ids("^22=b$\n7"), [(4, 6, 0, 0)])]
        ledger.score(0, [RolloutResult(0, turns, 1.0)])
        await ledger.close()

    asyncio.run(main())
    lines = text(find(directory, group=0)).splitlines()
    assert lines[6:] == [
        *("prompt, 3 tokens:", "  <bos>1=", "  ⟦v0⟧a<eos>", "  3-5 v0 lag 0"),
        *("prompt, 4 tokens:", "  <bos>22=", "  ⟦v0⟧b<eos>⟦given⟧", "  7", "  4-6 v0 lag 0"),
    ]


def test_a_character_of_several_tokens_is_never_cut(tmp_path: Path) -> None:
    """Bytes as tokens; the version changes within a character, and the completion ends within another."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(bytes_)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=256, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
    directory = make_run(tmp_path / "run", {"path": str(tmp_path / "model")})
    tokens = tokenizer.encode("é: 日本語", add_special_tokens=False)
    assert len(tokens) == 4 + 9

    async def main() -> None:
        ledger = await Ledger.open(LmdbStore(directory.ledger))
        ledger.admit(Task("t", {}), 1, 0)
        spans = [(4, 5, 0, 0), (5, 10, 1, 1), (10, 12, 2, 2)]
        ledger.score(0, [RolloutResult(0, [sequence(tokens[:12], spans)], 1.0)])
        await ledger.close()

    asyncio.run(main())
    page = find(directory, group=0)
    assert isinstance(page, GroupPage)
    (shown,) = page.members[0].sequences
    assert shown.prompt == "é: "
    assert [(piece.version, piece.text) for piece in shown.completion] == [(0, ""), (1, "日本"), (2, "\ufffd")]
    assert "  ⟦v0⟧⟦v1⟧日本⟦v2⟧\ufffd\n" in text(page)


def test_an_evaluation_stands_beside_the_first_one(run: RunDirectory) -> None:
    page = find(run, evaluation=LAST)
    assert isinstance(page, EvaluationPage) and (page.version, page.before, page.kept) == (6, 0, 3)
    assert [summary.version for summary in page.summaries] == [0, 6]
    lines = text(page).splitlines()
    assert lines[0] == "held-out tasks under version 6, and under version 0 before"
    start = lines.index('task heldout-0  {"digits": "0"}')
    assert lines[start + 1 : start + 3] == ["prompt, 3 tokens:", "  <bos>0="]
    assert lines[start + 3].startswith("version 0: reward 0.000") and lines[start + 4] == "  ⟦v0⟧0<eos>"
    assert lines[start + 6].startswith("version 6: reward 0.500") and lines[start + 7] == "  ⟦v6⟧6<eos>"

    def chosen(**options: int) -> list[str]:
        page = find(run, evaluation=LAST, **options)
        assert isinstance(page, EvaluationPage)
        return [sample.task for sample in page.samples]

    assert chosen(worst=2) == ["heldout-1", "heldout-0"] and chosen(best=1) == ["heldout-2"]
    first = find(run, evaluation=0)
    assert isinstance(first, EvaluationPage) and first.before is None and first.samples[0].before is None


def test_tracebacks_are_text(run: RunDirectory) -> None:
    page = find(run, failures=1)
    assert isinstance(page, FailuresPage) and (page.kept, len(page.failures)) == (2, 1)
    lines = text(page).splitlines()
    assert lines[1] == "  failed 2: ValueError: boom in request 7", "reasons that differ in a number are one kind"
    assert lines[3] == "group 9 member 0: ValueError: boom in request 8" and lines[-1] == "  ValueError: second"
    assert "  ValueError: ␛]0;title␇ [red]" in text(find(run, failures=5)).splitlines()


def test_the_hardest_problems_of_a_curriculum(tmp_path: Path) -> None:
    module = tmp_path / "counting.py"
    module.write_text(
        "from async_rl import Rows, environment\n"
        "tasks = lambda seed: Rows([{'count': n} for n in range(4)], heldout=0, seed=0)\n"
        "@environment('counting', tasks=tasks)\n"
        "async def counting(task, policy): return 0.0\n"
    )
    table = {"steps": 10, "model": {"path": "none"}, "curriculum": {"sampling": "prioritized"}}
    table["environment"] = {"name": "counting", "module": str(module)}
    run = RunDirectory(tmp_path / "run")
    run.create(recipes.from_table(table))

    async def play() -> None:
        ledger = await Ledger.open(LmdbStore(run.ledger))
        ledger.on_rest = lambda group: ProblemRecord(0.25 * group.task.problem, 1)
        for number in (3, 1, 2):
            group = ledger.admit(Task("train", {}, number), 1, 0)
            ledger.score(group.id, [rollout(0, "^1=$", [(2, 3, 0, 0)])])
        await ledger.close()

    asyncio.run(play())
    page = find(run, problems=2)
    assert isinstance(page, ProblemsPage)
    assert (page.tried, [(one.number, one.rate, one.rollouts) for one in page.problems]) == (
        3,
        [(1, 0.25, 1), (2, 0.5, 1)],
    )
    shown = text(page)
    assert "3 problems were tried; the 2 hardest:" in shown and '{"count": ' in shown
    module.unlink()
    assert [one.task for one in find(run, problems=9).problems] == [{}, {}, {}]


@pytest.mark.parametrize("options", [{}, {"step": STEP}, {"group": 0}, {"evaluation": LAST}, {"failures": 2}])
def test_json_has_it_all(run: RunDirectory, capsys: pytest.CaptureFixture[str], options: dict[str, int]) -> None:
    page = find(run, **options)
    show(page, as_json=True)
    printed = capsys.readouterr().out
    assert printed.isascii() and printed.count("\n") == 1 and "\x1b" not in printed
    read = json.loads(printed)
    assert read.keys() == set(type(page).__struct_fields__)
    if "group" in options:
        assert read["members"][0]["sequences"][0]["completion"][3]["text"] == "\x1b[m<eos>", "as it was sampled"
        assert read["task"] == {"id": "train-0", "data": {"sum": "0+[bold]1"}}


def test_what_does_not_fit_on_the_screen_goes_through_the_pager(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = find(run, group=0)
    monkeypatch.setenv("LESS", "")
    monkeypatch.delenv("LESS")
    assert "member 0" in coloured(page, monkeypatch, height=100) and not capsys.readouterr().out
    assert not coloured(page, monkeypatch, height=10)
    assert "\x1b[35m56" in capsys.readouterr().out, "the pager, which only prints where stdout is no terminal"
    assert os.environ["LESS"] == "-R"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step": 6}, r"--step 6: this run has steps 5$"),
        ({"group": 99}, r"--group 99: this run has groups 0-5$"),
        ({"group": 0, "member": 3}, r"--member 3: group 0 has members 0-2$"),
        (
            {"group": 1},
            r"--group 1: its tokens are gone \(2 trained\); there are tokens of steps 5 and of groups 2-3 that no step "
            r'holds yet \(controller.keep_rollouts = "sample" keeps .* "all" .*; this run has "sample"\)$',
        ),
        ({"group": 4}, r"--group 4: none of its members is scored yet \(2 running\); there are tokens of steps 5"),
        ({"group": 5}, r"--group 5: its tokens are gone \(2 cancelled: stale\)"),
        ({"evaluation": 3}, r"--eval 3: there are samples of versions 0, 6$"),
        ({"member": 1}, r"--member 1: of which group\? write --group ID --member 1$"),
        ({"worst": 1}, r"--worst 1: of which evaluation\? write --eval --worst 1$"),
        ({"evaluation": LAST, "best": 0}, r"--best 0: write 1 or more$"),
        ({"evaluation": LAST, "best": 1, "worst": 1}, r"--worst and --best: write one of them$"),
        ({"step": STEP, "group": 0}, r"--step and --group: write one of them$"),
        ({"failures": 0}, r"--failures 0: write 1 or more$"),
        ({"problems": 3}, r"--problems: this run has no curriculum"),
    ],
)
def test_wrong_input_says_what_there_is(run: RunDirectory, options: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        find(run, **options)
    assert "\n" not in str(error.value)


def test_a_step_whose_tokens_are_gone(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", {"tiny": {"characters": CHARACTERS}}, keep="none")
    asyncio.run(fill(directory, 6))
    with pytest.raises(
        UserError, match=r'--step 5: its tokens are gone; there are tokens of groups 2-3.*this run has "none"'
    ):
        find(directory, step=STEP)


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        find(RunDirectory(tmp_path))
    with pytest.raises(UserError, match="has no samples of an evaluation yet"):
        find(make_run(tmp_path / "run", {"tiny": {"characters": CHARACTERS}}), evaluation=LAST)


def test_a_run_at_work_can_be_read(tmp_path: Path) -> None:
    """The ledger is open for writing in this process; another one reads it."""
    directory = make_run(tmp_path / "run", {"tiny": {"characters": CHARACTERS}})

    async def main() -> str:
        ledger = await Ledger.open(LmdbStore(directory.ledger))
        ledger.admit(Task("t", {}), 1, 0)
        ledger.score(0, [rollout(0, "^9=9$", [(3, 5, 0, 0)])])
        await ledger.committed()
        code = (
            "import sys; from pathlib import Path; from async_rl.telemetry.browser import find, show\n"
            "from async_rl.telemetry.run_directory import RunDirectory\n"
            "show(find(RunDirectory(Path(sys.argv[1])))); assert 'torch' not in sys.modules\n"
            "show(find(RunDirectory(Path(sys.argv[1])), group=0))"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(directory.path), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        await ledger.close()
        return out.decode()

    printed = asyncio.run(main())
    assert "groups to read: 1 ready, in no step yet: 0" in printed and "⟦v0⟧9<eos>" in printed


def test_nothing_steers_a_terminal() -> None:
    steering = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x2028, 0xD800]))
    assert not set(clean(steering)) & set(steering) and len(clean(steering)) == len(steering)
    assert clean("a\tb\nc é 日本 👩\u200d🚀 [bold]") == "a\tb\nc é 日本 👩\u200d🚀 [bold]"
    clean(steering).encode()


def test_ranges() -> None:
    assert ranges([4, 0, 1, 2]) == "0-2, 4" and ranges([]) == ""
    assert ranges(range(0, 40, 2)) == "0, 2, 4, 6, ..., 34, 36, 38"
