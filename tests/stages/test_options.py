"""What a recipe asks for does something in every stage, or is refused by name before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_cases import gradients, recipe_of, stage_of, weights, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from async_rl.config import Model, TinyModel
from async_rl.errors import UserError
from async_rl.learner import packed_attention
from async_rl.learner.distributed import Ranks
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.stages import recipe as recipes
from async_rl.stages.config import StageRecipe
from async_rl.stages.runner import StageRun

ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"{i}=", "response": str(i * 7)} for i in range(1, 13)],
    "preference": [{"prompt": f"{i}=", "chosen": str(i * 7), "rejected": str(i)} for i in range(1, 13)],
    "reward-model": [{"prompt": f"{i}=", "chosen": str(i * 7), "rejected": str(i)} for i in range(1, 13)],
    "distill": [{"prompt": f"{i}="} for i in range(1, 13)],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tiny = tmp_path_factory.mktemp("teacher"), Model(tiny=TinyModel(characters="0123456789=", max_length=16))
    build_model(tiny, seed=5).save_pretrained(path)
    load_tokenizer(tiny).save_pretrained(path)
    return path


def asked(kind: str, folder: Path, teacher: Path, **sections: Any) -> StageRecipe:
    stage = {"heldout_rows": 4, "batch_rows": 4, "steps": 6, **sections.pop("stage", {})}
    if kind == "distill":
        sections = {"distill": {"teacher": str(teacher), "max_new_tokens": 4}, "generator": {"slots": 4}, **sections}
    return recipe_of(kind, write(folder / f"{kind}.jsonl", ROWS[kind]), stage=stage, **sections)


@pytest.mark.parametrize("kind", list(ROWS))
def test_layers_are_computed_again(kind: str, ranks: Ranks, tmp_path: Path, teacher: Path) -> None:
    """`learner.activation_checkpointing`: twice the forward passes, the same gradients bit for bit."""
    found: list[dict[str, Tensor]] = []
    passes: list[int] = []
    for again in (False, True):
        recipe = asked(kind, tmp_path, teacher, learner={"activation_checkpointing": again})
        stage, calls = stage_of(recipe, tmp_path / str(again), ranks), list[None]()
        layer: nn.Module = stage.trainer.model.base_model.layers[0].mlp  # pyright: ignore
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        stage.train(stage.data.train)
        found.append(gradients(stage))
        passes.append(len(calls))
    assert passes == [1, 2]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a code generator, and attention as on a GPU."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(packed_attention, "uses_spans", lambda model, device: True)
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at what it is given
@pytest.mark.parametrize("kind", ["reward-model", "distill"])
def test_layers_are_compiled(kind: str, traced: None, ranks: Ranks, tmp_path: Path, teacher: Path) -> None:
    """`learner.compile`, where the model is no plain policy or is asked for more than log-probs."""
    found: list[dict[str, Tensor]] = []
    for fused in (False, True):
        recipe = asked(kind, tmp_path, teacher, learner={"compile": fused})
        stage = stage_of(recipe, tmp_path / str(fused), ranks)
        stage.train(stage.data.train)
        found.append(gradients(stage))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == fused
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, atol=1e-5, rtol=1e-4, msg=name)


def kept(stage: StageRun) -> list[int]:
    return [int(path.name[1:]) for path in sorted(stage._directory.files.checkpoints.iterdir())]


@pytest.mark.parametrize("kind", list(ROWS))
def test_the_best_checkpoint_stays(kind: str, ranks: Ranks, tmp_path: Path, teacher: Path) -> None:
    """By the loss of the held-out rows, which rises here in the end, also of a stage that was stopped in between."""
    options: dict[str, Any] = {"checkpoint": {"every_steps": 1, "keep": 1, "keep_best": 1}}
    options |= {"stage": {"evaluate_every": 1}, "optimizer": {"learning_rate": 3e-2, "warmup_steps": 5}}
    recipe = asked(kind, tmp_path, teacher, **options)
    calls = iter(range(100))
    stopped = stage_of(recipe, tmp_path / "run", ranks, asked_to_stop=lambda: next(calls) == 8)
    assert not stopped.to_the_end() and 0 < stopped.step < 6
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    losses = {row["version"]: row["loss"] for row in stage.journal.evaluations if row["version"] > 0}
    best = min(losses, key=lambda version: losses[version])
    assert list(losses) == [1, 2, 3, 4, 5, 6] and kept(stage) == sorted({best, 6}), losses
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"]["loss"] == losses[best]
    assert load_file(Path(summary["best"]["checkpoint"]) / "model.safetensors").keys() == weights(stage).keys()


@pytest.mark.parametrize("kind", list(ROWS))
def test_trackers_are_told(kind: str, ranks: Ranks, tmp_path: Path, teacher: Path) -> None:
    recipe = asked(kind, tmp_path, teacher, report_to=["tensorboard"])
    stage = stage_of(recipe, tmp_path / "run", ranks)
    assert stage.to_the_end()
    stage.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(row["version"], pytest.approx(row["loss"])) for row in stage.journal.rows]
    told = [(event.step, event.value) for event in events.Scalars("evaluation/loss")]
    assert told == [(row["version"], pytest.approx(row["loss"])) for row in stage.journal.evaluations]
    assert len(told) == 2 and "evaluation/timestamp" not in events.Tags()["scalars"]


TEACHER = {"teacher": "a"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"learner": {"lora": {"rank": 4}}}, "learner.lora = {'rank': 4, .*a stage trains all weights: leave it"),
    ("sft", {"learner": {"ranks": 2}}, "learner.ranks = 2: leave it out: a stage runs on as many ranks as torchrun"),
    ("sft", {"report_to": ["mlflow"]}, r"report_to\[0\] = 'mlflow': write tensorboard, wandb or trackio"),
    ("sft", {"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best = 1: set stage.heldout or stage.heldout_rows, or"),
    ("sft", {"checkpoint": {"keep_best": -1}}, "checkpoint.keep_best = -1: write 0 or more"),
    ("sft", {"checkpoint": {"keep_best": 1, "every_steps": 6}, "stage": {"heldout_rows": 1, "evaluate_every": 4}},
     "stage.evaluate_every = 4: checkpoint.keep_best needs an evaluation of every checkpoint: write 6 or a divisor"),
    ("sft", {"stage": {"evaluate_every": 3}}, "stage.evaluate_every = 3: set stage.heldout or stage.heldout_rows"),
    ("sft", {"stage": {"template": "chat", "prompt_format": "Q {prompt}"}}, "stage.prompt_format = 'Q {prompt}': "),
    ("sft", {"generator": {"slots": 3}}, "generator.slots = 3: only a distillation that samples reads it"),
    ("sft", {"optimizer": {"schedule": "cosine", "decay_steps": 3}}, "optimizer.decay_steps = 3: a cosine schedule"),
    ("sft", {"distill": {"teacher": "a"}}, "distill.teacher = 'a': stage.kind = 'sft' does not read it: leave it out"),
    ("preference", {"stage": {"train_on": "assistant"}}, "stage.train_on = 'assistant': stage.kind = 'preference' doe"),
    ("preference", {"preference": {"loss": "simpo", "reference": "per_step"}}, "preference.reference = 'per_step': o"),
    ("distill", {"distill": TEACHER, "generator": {"engine": "sglang"}}, "generator.engine = 'sglang': a stage "),
    ("distill", {"distill": TEACHER, "generator": {"sglang": {"host": "b"}}}, "generator.sglang.host = 'b': a stage"),
    ("distill", {"distill": {**TEACHER, "responses": "data", "max_new_tokens": 3}}, "distill.max_new_tokens = 3: dist"),
    ("distill", {"distill": {**TEACHER, "responses": "data", "loss": "cross_entropy"}}, "distill.teacher = 'a': cross"),
    ("distill", {"distill": {**TEACHER, "responses": "teacher", "loss": "cross_entropy", "direction": "forward"}},
     "distill.direction = 'forward': only distill.loss = 'kl' has one"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sections", "says"), REFUSED, ids=[says[:40] for _, _, says in REFUSED])
def test_what_would_do_nothing_is_refused(kind: str, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        recipe_of(kind, Path("rows.jsonl"), **sections)


@pytest.mark.parametrize("sections", [
    {"optimizer": {"learning_rate": 1.0}}, {"learner": {"activation_checkpointing": True}}, {"report_to": ["wandb"]},
    {"checkpoint": {"keep_best": 1}}, {"generator": {"dtype": "bfloat16"}}, {"stage": {"steps": 3}},
])  # fmt: skip
def test_a_merge_reads_little(sections: dict[str, Any]) -> None:
    table = {"merge": {"a": "x", "b": "y"}, **sections, "stage": {"kind": "merge", **sections.get("stage", {})}}
    with pytest.raises(UserError, match=r"^[a-z_.]+ = .*: stage.kind = 'merge' does not read it: leave it out$"):
        recipes.from_table(table)
