"""One step of SFT, of DPO and of a PPO-style loss (DAPO), ours and TRL 1.16's: the same loss, the same weights after.

    python bench/peer_steps.py        writes bench/results/peers.json; exit code 1 if they differ by more than they may

Both sides start from the same directory of a tiny Llama and the same rows; TRL's trainers run whole, in an environment
of their own (.venv-peers, made at the first run), in fp32 with AdamW and clipping. For the PPO-style step TRL samples
and scores; ours is given its tokens, rewards and log-probs, and computes advantages, ratios and clipping itself.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from losses import ROOT, cpu_name, ensure_peers
from safetensors.torch import load_file
from torch import Tensor

from async_rl.config import Algorithm, Environment, Model, Optimizer, Run, TinyModel
from async_rl.config import Rollout as RolloutConfig
from async_rl.environments.sorting import SortingTasks
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner
from async_rl.models.loading import build_model, load_tokenizer
from async_rl.stages import recipe as recipes
from async_rl.stages.directory import StageDirectory
from async_rl.stages.runner import StageRun
from async_rl.wire.messages import MicroBatches, Sequence, TrainRollout, VersionSpan

RESULT = ROOT / "bench" / "results" / "peers.json"
TINY = TinyModel(characters="0123456789=", intermediate_size=192, max_length=32)
SETTINGS = {
    "learning_rate": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "clip_norm": 1.0, "beta": 0.1, "group_size": 8,
    "max_new_tokens": 6, "off_policy": 0.2,
}  # fmt: skip
ROWS, PROMPTS = 32, 8
TOLERANCE = {"loss": 1e-5, "weight": 1e-5, "update": 1e-4}
"""loss, weight: largest absolute difference; AdamW's first step moves every weight by about the learning rate, 1e-3,
also those whose gradient is all rounding, where the two may differ. update: |ours - TRL| as a share of |update of TRL|,
all weights together (L2)."""


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    python = ensure_peers()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        script = ROOT / "bench" / "peers" / "trl_steps.py"
        done = subprocess.run([python, script, directory], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"TRL's side failed:\n{done.stdout}{done.stderr}")
        ranks = Ranks.start(torch.device("cpu"))
        ours = {"sft": stage_step(directory, "sft", ranks), "dpo": stage_step(directory, "preference", ranks)}
        ours["grpo"] = rl_step(directory, ranks)
        ranks.stop()
        rows = [compare(directory, step, *found) for step, found in ours.items()]
    write(rows, python)
    return 0 if all(row["within"] for row in rows) else 1


def prepare(directory: Path) -> None:
    """The model, another one as DPO's reference, and the rows, for both sides."""
    tokenizer = load_tokenizer(Model(tiny=TINY))
    for name, seed in (("model", 1), ("reference", 2)):
        build_model(Model(tiny=TINY), seed=seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    tasks = SortingTasks(1, digits=5)
    digits = [tasks.train(index)["digits"] for index in range(ROWS)]
    sizes = np.random.default_rng(1).integers(1, 6, ROWS)  # answers of unequal length: a mean of means would show
    answers = ["".join(sorted(one))[:size] for one, size in zip(digits, sizes, strict=True)]

    def lines(name: str, rows: list[dict[str, str]]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("sft.jsonl", [{"prompt": f"{d}=", "response": a} for d, a in zip(digits, answers, strict=True)])
    rejected = [answer[::-1] + "0" for answer in answers]
    pairs = zip(digits, answers, rejected, strict=True)
    lines("pairs.jsonl", [{"prompt": f"{d}=", "chosen": a, "rejected": r} for d, a, r in pairs])
    lines("prompts.jsonl", [{"prompt": f"{d}="} for d in digits[:PROMPTS]])
    (directory / "settings.json").write_text(json.dumps(SETTINGS))


def stage_step(directory: Path, kind: Any, ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    """Loss and weights after one step of `async-rl stage`."""
    data = {"sft": "sft.jsonl", "preference": "pairs.jsonl"}[kind]
    table: dict[str, Any] = {
        "stage": {"kind": kind, "train": str(directory / data), "steps": 1, "batch_rows": ROWS, "template": "plain"},
        "model": {"path": str(directory / "model")},
        "optimizer": optimizer(),
    }
    if kind == "preference":
        table["preference"] = {"beta": SETTINGS["beta"], "reference_path": str(directory / "reference")}
    recipe, stage_directory = recipes.from_table(table), StageDirectory(directory / f"ours-{kind}")
    stage_directory.create(recipe)
    stage = StageRun(recipe, stage_directory, ranks)
    stage.train(stage.data.train)
    return stage.journal.rows[0]["loss"], dict(stage.trainer.model.named_parameters())


def rl_step(directory: Path, ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    """Loss and weights after one step of the learner on what TRL sampled."""
    sampled = load_file(directory / "sampled.safetensors")
    run = Run(
        steps=1,
        model=Model(path=str(directory / "model")),
        environment=Environment(name="sorting"),
        rollout=RolloutConfig(groups_per_step=PROMPTS, group_size=int(SETTINGS["group_size"])),
        algorithm=Algorithm(preset="dapo", options={"advantage_eps": 1e-4}),
        optimizer=msgspec.convert(optimizer(), Optimizer),
    )
    rollouts = [rollout(sampled, index) for index in range(len(sampled["rewards"]))]
    learner = Learner(run, directory / "ours-rl", ranks)
    metrics = learner.train(MicroBatches(0, 0, rollouts, [[list(range(len(rollouts)))]]))
    assert metrics["skipped"] == 0 and metrics["clip_fraction"] > 0, "the step is to be a real one, with clipping"
    return metrics["loss"], dict(learner.model.named_parameters())


def rollout(sampled: dict[str, Tensor], index: int) -> TrainRollout:
    prompt = sampled["prompt_ids"][index][sampled["prompt_mask"][index].bool()]
    mask = sampled["completion_mask"][index].bool()
    completion, behaviour = sampled["completion_ids"][index][mask], sampled["old_per_token_logps"][index][mask]
    tokens = torch.cat([prompt, completion]).numpy().astype("<i4")
    logprobs = np.zeros(len(tokens), "<f4")
    logprobs[len(prompt) :] = behaviour.numpy()
    group, member = divmod(index, int(SETTINGS["group_size"]))
    spans = [VersionSpan(len(prompt), len(tokens), 0, 0)]
    sequence = Sequence(tokens.tobytes(), logprobs.tobytes(), spans)
    return TrainRollout(group, member, float(sampled["rewards"][index]), [sequence])


def optimizer() -> dict[str, Any]:
    names = ("learning_rate", "betas", "eps", "clip_norm")
    return {name: SETTINGS[name] for name in names}


def compare(directory: Path, step: str, loss: float, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Prints one line."""
    theirs = json.loads((directory / f"{step}.json").read_text())["loss"]
    after, before = load_file(directory / f"{step}.safetensors"), load_file(directory / "model" / "model.safetensors")

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().flatten().double() for name in sorted(after)])

    difference, update = flat(weights) - flat(after), flat(after) - flat(before)
    apart, share = float(difference.abs().max()), float(difference.norm() / update.norm())
    row = {
        "step": step, "loss": loss, "loss_trl": theirs, "loss_difference": abs(loss - theirs),
        "largest_update_trl": float(update.abs().max()), "largest_weight_difference": apart, "update_difference": share,
    }  # fmt: skip
    within = row["loss_difference"] <= TOLERANCE["loss"] and apart <= TOLERANCE["weight"]
    row["within"] = within and share <= TOLERANCE["update"]
    print(
        f"{step:5} loss {loss:.7f}, TRL {theirs:.7f}, apart {row['loss_difference']:.1e}; weights apart at most "
        f"{apart:.1e}, together {share:.1e} of the update: {'equal' if row['within'] else 'DIFFERENT'}"
    )
    return row


def write(rows: list[dict[str, Any]], python: Path) -> None:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    say = "import trl, transformers; print(trl.__version__, transformers.__version__)"
    versions = subprocess.run([python, "-c", say], capture_output=True, text=True, check=True).stdout.split()
    head = {
        "what": "one optimiser step of ours and of TRL's trainers on the same tiny model and data, fp32",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpu_name()}",
        "torch": torch.__version__, "transformers": transformers.__version__, "trl": versions[-2],
        "transformers_trl": versions[-1], "tolerance": TOLERANCE, "settings": SETTINGS,
    }  # fmt: skip
    RESULT.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
