"""One whole training step (forward, loss, backward, clip, AdamW) of SmolLM2, on one core: useful tokens a CPU-second.

    python bench/train_step.py [--rounds 3] [--write]      bench/results/train_step_smollm2.json
    python bench/train_step.py --device cuda [--write]     bench/results/train_step_cuda.json, see train_step_cuda.py

    ours         a composed batch through learner.trainer: packed, a group's prompt computed once
    ours_alone   the same with every rollout carrying its own prompt
    padded       transformers' model on right-padded rows, log-softmax of all logits, the same optimiser
    padded_tuned the same with our allocator settings
    trl          the loss of TRL 1.16's GRPOTrainer on the same rows, in an environment of its own (.venv-peers)

In `ragged` a step is one micro-batch of 16 rollouts of 20 to 256 tokens, one of them at the cap, as thinking goes; in
`products` it is two, each of two groups of 8 of recipes/products_smollm2.toml, prompt 50 of 75 tokens. Useful are the
tokens of the rollouts, each with its prompt, whoever computes it how often; padding is not.

Every arm runs as its users run it: ours with the allocator settings that async_rl.launch gives every service, the
others without; `padded_tuned` is `padded` with ours. Each has a process of its own, so that its peak memory is its own
(VmHWM), and arms take turns, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stamp import commit

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
RESULT = ROOT / "bench" / "results" / "train_step_smollm2.json"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
ARMS = ("ours", "ours_alone", "padded", "padded_tuned", "trl")
DTYPES = ("float32", "bfloat16")
VOCABULARY = 49152
GROUP = 8
WARM_UP = 2
"""Steps before the measured ones: the second is the first that touches memory beside the optimiser's states."""
RAGGED = (20,) * 4 + (40,) * 2 + (60,) + (80,) * 7 + (120, 256)

Rollouts = list[tuple[int, np.ndarray, int]]
"""(group, [L] int32 tokens, tokens of the prompt)"""


def workload(name: str) -> list[Rollouts]:
    """By micro-batch."""
    rng = np.random.default_rng(1)

    def text(length: int) -> np.ndarray:
        return rng.integers(10, VOCABULARY, length).astype(np.int32)

    def products(group: int) -> Rollouts:
        prompt = text(50)
        return [(group, np.concatenate([prompt, text(int(rng.integers(15, 36)))]), 50) for _ in range(GROUP)]

    if name == "products":
        return [products(0) + products(1), products(2) + products(3)]
    return [[(0, text(length), 10) for length in RAGGED]]


# --- the arms: each makes a function that trains one step -------------------------------------------------------------


def ours(work: list[Rollouts], dtype: str, *, shared: bool) -> Callable[[], float]:
    from async_rl import config
    from async_rl.learner import step as train_step
    from async_rl.learner.trainer import Learner
    from async_rl.wire.messages import MicroBatches, Sequence, TrainRollout, VersionSpan

    run = config.Run(
        steps=1000,
        model=config.Model(path=str(MODEL)),
        environment=config.Environment(name="sorting"),
        algorithm=config.Algorithm(preset="reinforce"),  # no importance weights: nobody sampled these tokens
        learner=config.Learner(dtype=dtype),  # type: ignore[arg-type]
        rollout=config.Rollout(max_new_tokens=512),
    )
    train_step.pack = partial(train_step.pack, share_prompts=shared)
    learner = Learner(run, Path(tempfile.mkdtemp()))
    message: list[TrainRollout] = []
    for member, (group, tokens, prompt) in enumerate(itertools.chain.from_iterable(work)):
        logprobs = np.full(len(tokens), -np.log(VOCABULARY), np.float32)
        spans = [VersionSpan(prompt, len(tokens), 0, 0)]
        sequence = Sequence(tokens.tobytes(), logprobs.tobytes(), spans)
        message.append(TrainRollout(group, member, float(member % 3), [sequence]))
    size = len(work[0])
    plan = [list(range(start, start + size)) for start in range(0, len(message), size)]

    def train() -> float:
        step = learner.version
        batch = MicroBatches(step, step, message, [plan])
        metrics = learner.train(batch)
        assert not metrics["skipped"]
        return metrics["loss"]

    return train


def padded_rows(rollouts: Rollouts) -> dict[str, Any]:
    """[B, L] each, right-padded: tokens, attended, trained (a token, not its predictor)."""
    import torch

    longest = max(len(tokens) for _, tokens, _ in rollouts)
    ids = torch.zeros(len(rollouts), longest, dtype=torch.int64)
    attended, trained = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (_, tokens, prompt) in enumerate(rollouts):
        ids[row, : len(tokens)], attended[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64)), 1
        trained[row, prompt : len(tokens)] = 1
    return {"ids": ids, "attended": attended, "trained": trained}


def padded(work: list[Rollouts], dtype: str) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def loss(rows: dict[str, Any]) -> Any:
        advantages = torch.tensor([float(member % 3) - 1 for member in range(len(rows["ids"]))])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(rows["ids"], attention_mask=rows["attended"], use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, rows["ids"][:, 1:, None]).squeeze(2)
        mask = rows["trained"][:, 1:]
        return -((logp - logp.detach()).exp() * advantages[:, None] * mask).sum() / mask.sum()

    return accumulating(model, loss, [padded_rows(rollouts) for rollouts in work])


def trl(work: list[Rollouts], dtype: str) -> Callable[[], float]:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    count = len(work[0])
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=count, num_generations=GROUP,
        bf16=dtype == "bfloat16", beta=0.0, loss_type="dapo", report_to=[], gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, max_completion_length=512,
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(MODEL), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * count),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    prompts = max(prompt for _, _, prompt in work[0])

    def inputs(rows: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt_ids": rows["ids"][:, :prompts], "prompt_mask": rows["attended"][:, :prompts],
            "completion_ids": rows["ids"][:, prompts:], "completion_mask": rows["trained"][:, prompts:],
            "advantages": torch.tensor([float(member % 3) - 1 for member in range(count)]),
            "num_items_in_batch": rows["trained"].sum(),
        }  # fmt: skip

    batches = [inputs(padded_rows(rollouts)) for rollouts in work]
    return accumulating(model, lambda batch: trainer._compute_loss(model, batch), batches)


def accumulating(model: Any, loss_of: Callable[[Any], Any], batches: list[Any]) -> Callable[[], float]:
    import torch

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)

    def train() -> float:
        adamw.zero_grad()
        total = 0.0
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return total

    return train


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(arm: str, load: str, dtype: str, steps: int) -> dict[str, float]:
    """In this process: CPU seconds of a step (median, after WARM_UP that are not counted), peak memory."""
    import torch

    torch.set_num_threads(1)
    work = workload(load)
    if arm.startswith("ours"):
        train = ours(work, dtype, shared=arm == "ours")
    else:
        train = trl(work, dtype) if arm == "trl" else padded(work, dtype)
    for _ in range(WARM_UP):
        train()
    seconds: list[float] = []
    for _ in range(steps):
        started = time.process_time()
        train()
        seconds.append(time.process_time() - started)
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    useful = sum(len(tokens) for rollouts in work for _, tokens, _ in rollouts)
    return {"cpu_s": statistics.median(seconds), "useful_tokens": useful, "peak_gib": peak_kib / 2**20}


def in_process(arm: str, load: str, dtype: str, steps: int) -> dict[str, float]:
    from async_rl.launch.process import MALLOC

    python = str(PEERS) if arm == "trl" else sys.executable
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if arm.startswith("ours") or arm.endswith("tuned"):
        environment["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{key}={value}" for key, value in MALLOC.items())
    environment["PYTHONPATH"] = str(ROOT)
    command = [python, __file__, "--arm", arm, "--workload", load, "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm} {load} {dtype}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(rounds: int, steps: int, arms: list[str]) -> list[dict[str, Any]]:
    from losses import ensure_peers

    ensure_peers()
    cases = [(arm, load, dtype) for load in ("ragged", "products") for dtype in DTYPES for arm in arms]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(in_process(*case, steps))
            print(*case, found[case][-1], flush=True)
    rows = []
    for (arm, load, dtype), runs in found.items():
        speeds = [run["useful_tokens"] / run["cpu_s"] for run in runs]
        rows.append(
            {
                "workload": load,
                "dtype": dtype,
                "arm": arm,
                "useful_tokens": runs[0]["useful_tokens"],
                "tokens_per_cpu_s": round(statistics.median(speeds), 1),
                "range": [round(min(speeds), 1), round(max(speeds), 1)],
                "peak_gib": round(max(run["peak_gib"] for run in runs), 2),
                "warm_up": WARM_UP,
                "rounds": rounds,
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    speed = {(row["workload"], row["dtype"], row["arm"]): row["tokens_per_cpu_s"] for row in rows}
    found: dict[str, float] = {}
    for dtype in DTYPES:
        for load in ("ragged", "products"):
            for peer in ("padded", "padded_tuned", "trl"):
                value = speed[load, dtype, "ours"] / speed[load, dtype, peer]
                found[f"{load} {dtype}: ours / {peer}"] = round(value, 2)
        value = speed["products", dtype, "ours"] / speed["products", dtype, "ours_alone"]
        found[f"products {dtype}: ours / ours_alone"] = round(value, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of each process, after the warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="the others keep their figures")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--workload", choices=("ragged", "products"))
    parser.add_argument("--dtype", choices=DTYPES)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.workload, options.dtype, options.steps)))
        return
    if options.device == "cuda":
        from train_step_cuda import main as on_cuda

        on_cuda(write=options.write)
        return
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in [*kept, *measure_all(options.rounds, options.steps, options.arms)]:
        newest[row["workload"], row["dtype"], row["arm"]] = row
    rows = list(newest.values())
    found = ratios(rows)
    for row in rows:
        print(f"{row['workload']:9} {row['dtype']:9} {row['arm']:11} {row['tokens_per_cpu_s']:7.1f} tokens/CPU-s"
              f"  {row['peak_gib']:.2f} GiB")  # fmt: skip
    for name, value in found.items():
        print(f"{name:45} {value:.2f}")
    if options.write:
        RESULT.write_text(json.dumps({
            "machine": f"{platform.machine()}, one core", "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(), "steps": options.steps,
            "rows": rows, "ratios": found,
        }, indent=2) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
