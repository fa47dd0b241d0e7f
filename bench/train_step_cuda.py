"""A training step on one GPU: a random-initialised model of Qwen2.5-0.5B's shape, bf16, 32k packed tokens.

    python bench/train_step.py --device cuda [--write]      bench/results/train_step_cuda.json

MFU is model FLOPs (models.flops; layers or logits that are computed again count once) over what the same GPU reaches in
a bf16 matrix product of 8192 x 8192 x 8192. The loss of 2k tokens is compared with that of fp32 on the CPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from async_rl.config import Optimizer
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Optimisation
from async_rl.learner.packing import PackedTokens, Sequences, move, pack_sequences
from async_rl.learner.policy import PackedPolicy

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "train_step_cuda.json"
TOKENS, SMALL, MATRIX = 32768, 2048, 8192
WARM_UP, STEPS = 3, 8
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def sequences(total: int, vocabulary: int) -> tuple[PackedTokens, np.ndarray]:
    """Lognormal lengths that add up to `total`, a quarter of each its prompt. Returns the lengths too."""
    rng = np.random.default_rng(1)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = int(np.clip(1200 * rng.lognormal(0, 0.8), 64, total // 4))
        lengths.append(length if left - length >= 64 else left)
    length_S = np.array(lengths)
    trained_A = np.concatenate([np.arange(length) >= max(1, length // 4) for length in lengths])
    tokens_A = rng.integers(10, vocabulary, total).astype(np.int32)
    of = Sequences.of(tokens_A, trained_A, length_S)
    everyone = np.arange(len(lengths))
    return pack_sequences(of, everyone, np.zeros_like(everyone)).tokens, length_S


def flops(model: Qwen2ForCausalLM, tokens: PackedTokens, length_S: np.ndarray) -> float:
    """Forward and backward: 6 per parameter and token, the head's only where a token is trained on, and attention."""
    config: Any = model.config
    head = config.vocab_size * config.hidden_size
    body = model.num_parameters() - head
    attention = config.num_hidden_layers * config.hidden_size * float((length_S.astype(np.float64) ** 2).sum())
    return 6 * (body * tokens.input_1T.numel() + head * len(tokens.target_K) + attention)


def matmul_ceiling(device: torch.device) -> float:
    """FLOPs a second, the best of a few."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    return max(2 * MATRIX**3 / seconds(lambda: a @ b, 20) for _ in range(5))


def seconds(work: Any, times: int) -> float:
    """Mean of one call."""
    for _ in range(2):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def loss_of(policy: PackedPolicy, tokens: PackedTokens) -> torch.Tensor:
    return -policy(tokens).logp_K.mean()


def train(device: torch.device, ranks: Ranks, ceiling: float, *, recompute: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(device)
    policy = PackedPolicy(model, dtype="bfloat16")
    if recompute:
        policy.recompute_layers()
    optimisation = Optimisation(policy.parameters(), Optimizer(learning_rate=1e-6), 1000, ranks)
    packed, length_S = sequences(TOKENS, SHAPE["vocab_size"])
    tokens = move(packed, device)

    def step() -> None:
        totals = optimisation.accumulate([lambda: (loss_of(policy, tokens), {})])
        assert not optimisation.update(0, totals)["skipped"]

    for _ in range(WARM_UP):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = [seconds(step, 1) for _ in range(STEPS)]
    taken = statistics.median(times)
    return {
        "activation_checkpointing": recompute, "step_s": round(taken, 4),
        "step_s_range": [round(min(times), 4), round(max(times), 4)], "tokens_per_s": round(TOKENS / taken),
        "mfu_of_matmul": round(flops(model, tokens, length_S) / taken / ceiling, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "sequences": len(length_S),
    }  # fmt: skip


def same_loss(device: torch.device) -> dict[str, float]:
    packed, _ = sequences(SMALL, SHAPE["vocab_size"])
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    with torch.no_grad():
        expected = float(loss_of(PackedPolicy(model), packed))
        found = float(loss_of(PackedPolicy(model.to(device), dtype="bfloat16"), move(packed, device)))
    assert abs(found - expected) < 0.02 * abs(expected), f"loss {found} on the GPU, {expected} on the CPU"
    return {"cpu_fp32": expected, "gpu_bf16": found}


def main(*, write: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use")
    device = torch.device("cuda", 0)
    ranks = Ranks.start(device)
    ceiling = matmul_ceiling(device)
    rows: list[dict[str, Any]] = []
    for recompute in (False, True):
        try:
            rows.append(train(device, ranks, ceiling, recompute=recompute))
        except torch.cuda.OutOfMemoryError:
            rows.append({"activation_checkpointing": recompute, "out_of_memory": True})
        torch.cuda.empty_cache()
        print(rows[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(), "tokens": TOKENS, "matmul_tflops": round(ceiling / 1e12, 1),
        "loss": same_loss(device), "rows": rows,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if write:
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    ranks.stop()
