"""The report as a reader finds it: parsed as HTML, its images as PNG; also of runs that have little to show."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from async_rl import recipes
from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.records import StepRecord
from async_rl.ledger.store import LmdbStore
from async_rl.models.tiny import tiny_tokenizer
from async_rl.telemetry import plots, samples
from async_rl.telemetry.report import one_sentence, write_report
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.wire.messages import RolloutResult, Task, VersionSpan
from async_rl.wire.messages import Sequence as Tokens

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '</pre></td><script>alert("1")</script><img src=x onerror=alert(2)>&lt;b&gt;{{ 7*7 }}'


def recipe(**sections: Any) -> Run:
    model = {"tiny": {"characters": PRINTABLE, "max_length": 1024}}
    return recipes.from_table({"steps": 8, "model": model, "environment": {"name": "sorting"}} | sections)


def row(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "version": step + 1,
        "reward": 0.1 * step,
        "train_exact": 0.05 * step,
        "train_s": 0.1,
        "tokens": 100,
        "samples": 16.0,
        "masked_fraction": 0.1,
        "lag": {"mean": 1.0, "p95": 2, "max": 2, "tokens": {"0": 20, "1": 70, "9": 10}},
        "tokens_per_s": {"generator": 50.0 + step, "learner": 40.0},
        "tokens_per_cpu_s": 30.0,
        "completion_length_mean": 3.0 + step,
        "ess_frac": 0.9,
        "clip_fraction_low": 0.01,
        "guarded_fraction": 0.0,
        "entropy": 2.0 - 0.1 * step,
        "grad_norm": 1.0,
        "mismatch_k3": 0.001,
        "skipped": 0.0,
        "busy": {"learner": 0.9, "generator": 0.5},
        "idle": {"learner": {"wait_batch": 0.1}, "generator": {"wait_lease": 0.3, "environment": 0.2}},
        "wall_s": 2.0 * (step + 1),
        "timestamp": 1.7e9 + step,
    } | changed


def evaluation(version: int, exact: float, **metrics: float) -> dict[str, Any]:
    metrics = {"exact": exact, **metrics}
    return {"version": version, "tasks": 30, "failed": 0, "reward": exact, "metrics": metrics, "tokens": 9}


def sample(version: int, task: str, prompt: str, said: str, reward: float, run: Run) -> dict[str, Any]:
    """As the controller writes it: bos, the prompt, the completion, eos."""
    assert run.model.tiny is not None
    tokenizer = tiny_tokenizer(run.model.tiny)
    asked = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    tokens = [*asked, *tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]
    middle = (len(asked) + len(tokens)) // 2
    spans = [[len(asked), middle, version, version], [middle, len(tokens), version + 1, version]]
    sequence = {"tokens": tokens, "logprobs": [0.0] * len(tokens), "spans": spans}
    base = {"version": version, "task": {"id": task, "data": {}}, "parts": {}, "metrics": {"exact": reward}}
    return base | {"reward": reward, "finish_reason": "stop", "sequences": [sequence]}


def write(path: Path, lines: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(path: Path, run: Run | None = None, *, steps: int = 8, evaluated: Sequence[Any] = ()) -> RunDirectory:
    directory = RunDirectory(path)
    directory.create(recipe() if run is None else run)
    write(directory.metrics, [row(step) for step in range(steps)])
    write(directory.evaluations, evaluated)
    return directory


BOTH = (evaluation(0, 1 / 3), evaluation(8, 0.8))


class Page(HTMLParser):
    """Elements with their attributes, and text by the path of tags it stands in."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
            if tag == "pre":
                self.texts.append((tuple(self._open), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for path, text in self.texts if "style" not in path).split())

    def within(self, tag: str) -> list[str]:
        return [text for path, text in self.texts if tag in path and text.strip()]

    def images(self) -> Iterator[bytes]:
        for tag, attributes in self.elements:
            if tag == "img":
                head, _, data = str(attributes["src"]).partition(",")
                assert head == "data:image/png;base64"
                yield base64.b64decode(data, validate=True)


def read(directory: RunDirectory) -> Page:
    return Page(directory.report.read_text(encoding="ascii"))


def test_a_complete_run(tmp_path: Path) -> None:
    directory = make(tmp_path / "sort", evaluated=[BOTH[0], evaluation(4, 0.5), BOTH[1]])
    report = write_report(directory)
    page = read(directory)
    sentence = "held-out greedy exact 0.33 -> 0.80 on 30 tasks, 8 steps, 16 s, lag mean 1.0 (bound 4)"
    assert report.sentence == sentence
    assert [text for text in page.within("p") if "held-out greedy exact" in text] == [sentence]
    for figure in ("held-out greedy exact 0.333 ± 0.08 0.8 ± 0.07 +0.467", "8 of 8", "10.00%", "800, 50 a second"):
        assert figure in page.text, figure
    assert "Not complete" not in page.text

    names = ["reward", "exact", "completion_length", "speed", "weights", "stability", "lag", "waiting"]
    assert [path.name for path in report.plots] == [f"{name}.png" for name in names]
    on_disk = [path.read_bytes() for path in report.plots]
    assert all(png.startswith(PNG) for png in on_disk) and list(page.images()) == on_disk
    assert not list(directory.path.rglob("*.partial"))


def test_mismatch_by_lag_and_under_the_same_weights(tmp_path: Path) -> None:
    directory = make(tmp_path)
    by_lag = {f"mismatch_lag_{lag}_{name}": 0.01 * (lag + 1) for lag in (1, 2, 4) for name in ("tokens", "abs", "k3")}
    none, some = {"equal_version_tokens": 0.0}, {"equal_version_tokens": 100.0}
    rows = [row(step, **by_lag, **(none if step % 3 else some | {"equal_version_gap": 1e-6})) for step in range(7)]
    rows.append(row(7, **by_lag, equal_version_tokens=700.0, equal_version_gap=2e-6))
    write(directory.metrics, rows)
    report = write_report(directory)
    page = read(directory)
    assert [path.stem for path in report.plots][-3:] == ["mismatch", "lag", "waiting"]
    text = "log-probs of engine and learner under the same weights 1.7e-06 nats apart on average over 1,000 tokens"
    assert f"{text} (limit 0.001)" in page.text, "of the recipe"
    write(directory.metrics, [one | {"equal_version_limit": 0.06} for one in rows])
    write_report(directory)
    assert f"{text} (limit 0.06)" in read(directory).text, "of what the processes said they compute in"


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    directory = make(tmp_path, evaluated=BOTH)
    write_report(directory)
    page = read(directory)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base"})
    links = [str(attributes[key]) for _, attributes in page.elements for key in ("src", "href") if key in attributes]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    anchors = {attributes.get("id") for _, attributes in page.elements}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert "url(" not in directory.report.read_text() and "@import" not in directory.report.read_text()


def test_nothing_from_data_becomes_markup(tmp_path: Path) -> None:
    run = recipe(environment={"name": "sorting", "options": {"note": HOSTILE}})
    odd = f"{HOSTILE} \x1b[31m \ud800 \u202e"
    directory = make(tmp_path / "<b>run", run, evaluated=[evaluation(0, 0.0), evaluation(8, 1.0, **{HOSTILE: 1.0})])
    write(directory.metrics, [row(step, **{f"train_{HOSTILE}": 1.0, "train_$x_$": 0.5}) for step in range(8)])
    rows = [sample(0, HOSTILE, HOSTILE, "<i>old</i>", 0.0, run), sample(8, HOSTILE, HOSTILE, HOSTILE, 1.0, run)]
    rows[1]["finish_reason"] = HOSTILE
    write(directory.samples, rows)
    write(directory.failures, [{"group": 1, "member": 2, "reason": HOSTILE, "traceback": odd}])
    report = write_report(directory)
    page = read(directory)

    assert {"script", "b", "i"}.isdisjoint({tag for tag, _ in page.elements})
    assert len(list(page.images())) == len(report.plots), "no image but the plots"
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.within("ins") and HOSTILE in page.within("article")
    assert "\u241b[31m" in page.text and "\ufffd" in page.text and "&#27;" not in directory.report.read_text()
    assert page.text.count(HOSTILE) >= 6, "as text, where it belongs: recipe, prompt, completion, metric, failure"


def test_samples_before_and_after(tmp_path: Path) -> None:
    run = recipe()
    directory = make(tmp_path, run, evaluated=BOTH)
    said = {"same": ("0123", "0123", 1.0, 1.0), "small": ("7223", "0223", 0.5, 0.75)}
    said |= {
        "lost": ("89", "98", 1.0, 0.0),
        "big": ("", "it is 4", 0.0, 1.0),
        "words": ("it is 3", "it is 4", 0.0, 0.9),
    }
    write(
        directory.samples,
        [sample(0, task, f"{task}?", old, before, run) for task, (old, _, before, _) in said.items()]
        + [sample(4, task, f"{task}?", "in between", 0.0, run) for task in said]
        + [sample(8, task, f"{task}?", "before the learner went back", 0.0, run) for task in said]
        + [sample(8, task, f"{task}?", new, after, run) for task, (_, new, _, after) in said.items()]
        + [sample(99, task, f"{task}?", "of steps that were undone", 0.0, run) for task in said],
    )
    write_report(directory)
    page = read(directory)
    assert page.within("h3") == ["Gained: 3", "Lost: 1", "Unchanged: 1"]
    shown = "".join(text or "|" for path, text in page.texts if "article" in path and "pre" in path)
    blocks = [block for block in shown.split("|") if block]
    wanted = [(task, *said[task][:2]) for task in ("big", "words", "small", "lost", "same")]
    assert blocks == [text or "(nothing)" for task, old, new in wanted for text in (f"{task}?", old, new)]
    assert page.within("del") == ["3", "7", "9"] and page.within("ins") == ["it is 4", "4", "0", "9"]
    assert "reward +1" in page.text and "reward -1" in page.text and "step 0 and at step 8" in page.text
    opened = [attributes for tag, attributes in page.elements if tag == "details"]
    assert ["open" in attributes for attributes in opened[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("steps", "evaluated", "sentence", "says", "num_plots"),
    [
        (0, [], "0 of 8 steps, 0 s", "No step has been trained yet.", 0),
        (0, [BOTH[0]], "held-out greedy exact 0.33 on 30 tasks, 0 of 8 steps, 0 s", "No step has been", 0),
        (1, [], "training reward 0.00 -> 0.00, 1 of 8 steps, 2 s, lag mean 1.0 (bound 4)", "no evaluation", 1),
        (
            5,
            [BOTH[0], evaluation(3, 0.6)],
            "held-out greedy exact 0.33 -> 0.60 on 30 tasks at step 3, 5 of 8 steps, 10 s, lag mean 1.0 (bound 4)",
            "Not complete: 5 of 8 steps",
            8,
        ),
        (5, BOTH, "held-out greedy exact 0.33 on 30 tasks, 5 of 8 steps, 10 s, lag mean 1.0 (bound 4)", "5 of 8", 8),
    ],
)
def test_runs_that_are_not_complete(
    tmp_path: Path, steps: int, evaluated: Sequence[Any], sentence: str, says: str, num_plots: int
) -> None:
    directory = make(tmp_path, steps=steps, evaluated=evaluated)
    report = write_report(directory)
    page = read(directory)
    assert report.sentence == sentence and sentence in page.text
    assert says in page.text and "No samples: no evaluation has written samples.jsonl" in page.text
    assert "Promises not counted" in page.text and "No episode failed." in page.text
    assert len(report.plots) == num_plots == len(list(page.images()))


def test_a_summary_of_fewer_steps_is_not_believed(tmp_path: Path) -> None:
    """A complete run that was continued, and is at work: summary.json is of the first part."""
    directory = make(tmp_path, steps=6, evaluated=[BOTH[0], evaluation(4, 0.5)])
    old = {"steps": 4, "wall_s": 1e6, "busy": {}, "idle": {}}
    directory.summary.write_text(json.dumps(old))
    assert write_report(directory).sentence.endswith("at step 4, 6 of 8 steps, 12 s, lag mean 1.0 (bound 4)")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    directory = make(tmp_path, evaluated=BOTH)
    report = write_report(directory)
    page = read(directory)
    assert report.plots == [] and not list(page.images())
    assert "pip install 'async-rl[report]'" in page.text and "0.33 -> 0.80" in page.text
    assert "#plots" not in [attributes.get("href") for _, attributes in page.elements]


@pytest.mark.parametrize("there", [False, True])
def test_a_model_that_is_gone(tmp_path: Path, there: bool) -> None:
    gone = tmp_path / "model"
    if there:  # but empty
        gone.mkdir()
    directory = make(tmp_path / "run", recipe(model={"path": str(gone)}), evaluated=BOTH)
    write(directory.samples, [sample(0, "t", "a", "b", 0.0, recipe())])
    report = write_report(directory)
    assert any(line.startswith("No samples: model.path") for line in report.missing)
    assert report.missing[0] in read(directory).text


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report(RunDirectory(tmp_path / "nothing"))
    directory = make(tmp_path / "run")
    directory.plots.write_text("a file where the plots should go")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        write_report(directory)


@pytest.mark.parametrize(("lag", "verdict"), [(4, "Kept"), (5, "BROKEN")])
def test_promises_are_counted_from_the_ledger(tmp_path: Path, lag: int, verdict: str) -> None:
    directory = make(tmp_path, evaluated=BOTH)

    async def main() -> None:
        ledger = await Ledger.open(LmdbStore(directory.ledger))
        group = ledger.admit(Task("t", {}), 2, version=0)
        ledger.admit(Task("u", {}), 2, version=0)
        tokens = Tokens(b"\0" * 8, b"\0" * 8, [VersionSpan(1, 2, 0, 0)])
        ledger.score(group.id, [RolloutResult(member, [tokens], 1.0) for member in (0, 1)])
        ledger.compose(StepRecord(0, [(group.id, [0, 1])], 4, 0, lag))
        await ledger.committed()
        assert ledger.trained(0)
        await ledger.close()

    asyncio.run(main())
    write_report(directory)
    text = read(directory).text
    assert f"{verdict}, counted again" in text and "rollouts admitted 4" in text and "rollouts running 2" in text


def test_what_a_step_changes_of_the_weights_where_it_is_known(tmp_path: Path) -> None:
    directory = make(tmp_path)
    assert "weights that a step changes" not in write_report(directory).html.read_text()
    write(directory.metrics, [row(step, weights_changed=0.02 * step) for step in range(1, 3)])
    texts = [text for _, text in Page(write_report(directory).html.read_text()).texts]
    assert texts[texts.index("weights that a step changes") + 1] == "3.0%"


def test_torch_comes_in_only_to_read_samples(tmp_path: Path) -> None:
    directory = make(tmp_path, evaluated=BOTH)
    code = "import sys; from pathlib import Path; from async_rl.telemetry.report import write_report\n"
    code += "from async_rl.telemetry.run_directory import RunDirectory\n"
    code += f"write_report(RunDirectory(Path({str(directory.path)!r})))\n"
    code += "print([name for name in ('torch', 'transformers', 'matplotlib.pyplot') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sentences_without_evaluation_or_exact() -> None:
    base = {"steps": 8, "wall_s": 201.4, "reward_first": 0.1, "reward_last": 0.9, "lag": {"mean": 1.23}}
    run = recipe()
    assert one_sentence(base | {"eval_before": None, "eval_after": None}, run) == (
        "training reward 0.10 -> 0.90, 8 steps, 201 s, lag mean 1.2 (bound 4)"
    )
    summary = base | {  # as summary.json has them
        "eval_before": {"reward": 0.25, "tasks": 30, "failed": 0},
        "eval_after": {"reward": 0.5, "tasks": 30, "failed": 2},
    }
    assert one_sentence(summary, run) == (
        "held-out greedy reward 0.25 -> 0.50 on 30 tasks (2 failed), 8 steps, 201 s, lag mean 1.2 (bound 4)"
    )


# --- plots ------------------------------------------------------------------------------------------------------------


def test_only_plots_whose_data_exist() -> None:
    bare = [{"version": v, "reward": v, "lag": {"mean": 0.0, "max": 0}, "tokens": 1} for v in (1, 2, 3)]
    assert [plot.name for plot in plots.draw(bare, [], recipe(), {})] == ["reward"]
    assert plots.draw(bare[:1], [], recipe(), {}) == []


def test_models_beside_the_policy_have_plots_where_they_are() -> None:
    critic = {"explained_variance": 0.5, "value_mean": 0.1, "return_mean": 0.2, "value_loss": 0.01}
    rows = [row(step, **critic, reward_model=0.3, reward_environment=0.1, kl_penalty=0.2) for step in range(3)]
    names = [plot.name for plot in plots.draw(rows, [], recipe(), {})]
    assert names[:4] == ["reward", "exact", "reward_parts", "critic"]


def test_values_that_are_no_numbers_are_gaps() -> None:
    broken = {"reward": float("nan"), "grad_norm": float("inf"), "entropy": None}
    rows = [row(0), row(1, **broken), row(2), row(3, grad_norm=1e9), row(4), row(5)]
    drawn = plots.draw(rows, [], recipe(), plots.shares_by_cause(rows[0]["busy"], rows[0]["idle"]))
    assert all(plot.png.startswith(PNG) for plot in drawn) and len(drawn) == 8


@pytest.mark.parametrize("bound", [0, 1, 32])
def test_any_bound_of_the_lag(bound: int) -> None:
    lag = {"mean": bound / 2, "max": bound, "tokens": {str(lag): 10 for lag in range(bound + 3)}}
    run = recipe(staleness={"max_staleness": bound})
    (plot,) = [plot for plot in plots.draw([row(s, lag=lag) for s in range(4)], [], run, {}) if plot.name == "lag"]
    assert f"bound of {bound}; 10.0% masked" in plot.title


def test_shares_of_a_role_sum_to_one() -> None:
    shares = plots.shares_by_cause({"generator": 0.5}, {"generator": {"environment": 0.1, "wait_lease": 0.2}})
    assert list(shares["generator"]) == ["engine_step", "wait_lease", "environment", "unaccounted"]
    assert sum(shares["generator"].values()) == pytest.approx(1.0)
    assert list(plots.shares_by_cause({"learner": 1.0}, {})["learner"]) == ["train_step"]


def test_long_runs_are_thinned_without_losing_a_spike() -> None:
    y = np.sin(np.arange(100_000) / 5000)
    y[77_777], y[33_333], y[50_000:60_000] = 40.0, -40.0, np.nan
    x, thin = plots.thinned(np.arange(100_000.0), y)
    assert len(x) <= plots.MAX_POINTS and {40.0, -40.0} <= set(thin) and list(x) == sorted(x)
    assert plots.thinned(x, thin) == (x, thin), "short ones as they are"


def test_smoothing_leaves_a_constant_alone_to_the_edges() -> None:
    y = np.full(200, 3.0)
    y[7] = np.nan
    smooth = plots.smoothed(y)
    assert np.isnan(smooth[7]) and np.allclose(np.delete(smooth, 7), 3.0)


# --- samples ----------------------------------------------------------------------------------------------------------

CHATML = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|begin|><|start|>system<|end|>\n\nBe kind.<|eot|><|start|>user<|end|>\n\n{}<|eot|><|start|>assistant<|end|>\n\n"
)
PLAIN = "{}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and the special tokens of chat templates."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(PRINTABLE)}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start|>", "<|end|>", "<|eot|>"]
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, PLAIN])
def test_prompts_are_shown_without_markup(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokens = tokenizer.encode(template.format("How many?\nuser\nroles?"))
    assert samples.Transcriber(tokenizer).prompt(tokens) == "How many?\nuser\nroles?"


def test_a_conversation_keeps_its_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = "<|im_start|>{}<|im_end|>\n"
    tokens = tokenizer.encode("".join(map(turns.format, ("user\nhi", "assistant\nyes?", "user\n2+2"))))
    assert samples.Transcriber(tokenizer).prompt(tokens) == "[user] hi\n[assistant] yes?\n[user] 2+2"


def test_what_the_policy_was_told_in_between(tokenizer: PreTrainedTokenizerFast) -> None:
    """Two turns with a tool's answer between them, then a second sequence."""
    pieces = [CHATML.format("2+2"), "let me see<|im_end|>", "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"]
    encoded = [tokenizer.encode(piece) for piece in (*pieces, "it is 4<|im_end|>")]
    ends = np.cumsum([len(part) for part in encoded])
    spans = [[int(ends[0]), int(ends[0]) + 3, 0, 0], [int(ends[0]) + 3, int(ends[1]), 1, 0]]
    first = {"tokens": list(chain.from_iterable(encoded)), "spans": [*spans, [int(ends[2]), int(ends[3]), 1, 1]]}
    question, answer = tokenizer.encode(CHATML.format("sure?")), tokenizer.encode("yes<|im_end|>")
    second = {"tokens": question + answer, "spans": [[len(question), len(question + answer), 1, 1]]}
    said = samples.Transcriber(tokenizer).completion([first, second])
    assert said == "let me see\n\n[tool] 4\n\nit is 4\n\n[next prompt] sure?\n\nyes"


def test_long_texts_keep_their_end() -> None:
    text = "a" * 5000 + "the answer"
    short = samples.shorten(text)
    assert short.endswith("the answer") and "[... 1,010 characters ...]" in short and samples.shorten("ab") == "ab"


@given(st.text("ab 1\n", max_size=30), st.text("ab 1\n", max_size=30))
def test_passages_add_up_to_the_texts(before: str, after: str) -> None:
    sides = samples.compare(before, after)
    for side, text in zip(sides, (before, after), strict=True):
        assert "".join(part for part, _ in side) == text and all(part for part, _ in side)
    kept = ["".join(part for part, changed in side if not changed) for side in sides]
    assert kept[0] == kept[1], "what is not marked is the same on both sides"
