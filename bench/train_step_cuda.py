"""A training step on one GPU: a random-initialised model of Qwen2.5-0.5B's shape, bf16, 32k packed tokens.

    python bench/train_step.py --device cuda [--write]      bench/results/train_step_cuda.json

MFU is model FLOPs (models.flops; layers or logits that are computed again count once) over what the same GPU reaches in
a bf16 matrix product of 8192 x 8192 x 8192. Arms, each of which must have the loss of the first:

    plain                transformers' layers in eager mode, log-softmax in fp32
    head                 the same layers, fused log-softmax
    compile              learner.compile: fused layers too
    again                learner.activation_checkpointing
    compile again        both

The loss of 2k tokens is compared with that of fp32 on the CPU. An arm that fails is reported, the others go on. Printed
besides: how often a step of the fastest arm made the host wait for the GPU, its 25 most expensive kernels, and the time
of one layer's attention by torch's flash kernels, as the learner uses them, and by cuDNN's.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stamp import commit
from transformers import Qwen2Config, Qwen2ForCausalLM

from async_rl.config import Optimizer
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Optimisation, Totals
from async_rl.learner.packing import PackedTokens, Sequences, move, pack_sequences
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.varlen import attend_spans, spans_of

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "train_step_cuda.json"
TOKENS, SMALL, MATRIX = 32768, 2048, 8192
WARM_UP, STEPS, KERNELS = 3, 8, 25
LOSS_TOLERANCE, NORM_TOLERANCE = 0.002, 0.02
"""Relative, in bf16: of a mean over tokens, of the norm of the gradient."""
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


class Arm(NamedTuple):
    name: str
    head: bool = False
    layers: bool = False
    again: bool = False


ARMS = (
    Arm("compile", head=True, layers=True), Arm("plain"), Arm("head", head=True),
    Arm("compile again", head=True, layers=True, again=True), Arm("again", again=True),
)  # fmt: skip
"""In this order: what is wanted most first, should the time run out."""


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


def model_of(device: torch.device) -> Qwen2ForCausalLM:
    """The same weights every time; drawn where they stay."""
    torch.manual_seed(1)
    with device:
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


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


def seconds(work: Callable[[], object], times: int) -> float:
    """Mean of one call."""
    work()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def loss_of(policy: PackedPolicy, tokens: PackedTokens) -> torch.Tensor:
    return -policy(tokens).logp_K.mean()


class Training:
    """One arm: a step, and what it costs."""

    def __init__(self, arm: Arm, device: torch.device, ranks: Ranks) -> None:
        self.arm = arm
        self._model = model_of(device)
        policy = PackedPolicy(self._model, dtype="bfloat16")
        if arm.layers:
            policy.fuse()
        policy._fused = arm.head
        if arm.again:
            policy.recompute_layers()
        self._policy = policy
        self._optimisation = Optimisation(policy.parameters(), Optimizer(learning_rate=1e-6), 1000, ranks)
        packed, self._length_S = sequences(TOKENS, SHAPE["vocab_size"])
        self._tokens = move(packed, device)

    def step(self) -> Totals:
        totals = self._optimisation.accumulate([lambda: (loss_of(self._policy, self._tokens), {})])
        assert not self._optimisation.update(0, totals)["skipped"]
        return totals

    def measure(self, ceiling: float) -> dict[str, Any]:
        began = time.monotonic()
        steps = [self.step() for _ in range(WARM_UP)]
        first = steps[0]
        warm_up = time.monotonic() - began
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            began = time.monotonic()
            self.step()
            torch.cuda.synchronize()
            times.append(time.monotonic() - began)
        taken = statistics.median(times)
        return {
            "arm": self.arm.name, "step_s": round(taken, 4),
            "step_s_range": [round(min(times), 4), round(max(times), 4)],
            "tokens_per_s": round(TOKENS / taken), "loss": first.loss, "grad_norm": first.grad_norm,
            "mfu_of_matmul": round(flops(self._model, self._tokens, self._length_S) / taken / ceiling, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "sequences": len(self._length_S),
            "warm_up_s": round(warm_up, 1),
        }  # fmt: skip

    def waits(self) -> list[str]:
        """Where the host waited for the GPU in one step."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]

    def kernels(self) -> list[str]:
        """The most expensive ones of a step: ms, calls, name."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.step()
            torch.cuda.synchronize()
        spent: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                one = spent.setdefault(event.name, [0.0, 0])
                one[0] += event.device_time_total / 1e3
                one[1] += 1
        ordered = sorted(spent.items(), key=lambda item: -item[1][0])
        rows = [f"{ms:8.2f} ms {calls:5d}  {name[:90]}" for name, (ms, calls) in ordered[:KERNELS]]
        total = sum(ms for ms, _ in spent.values())
        return [*rows, f"{total:8.2f} ms        all of {sum(int(calls) for _, calls in spent.values())} kernels"]


def same_loss(device: torch.device) -> dict[str, float]:
    packed, _ = sequences(SMALL, SHAPE["vocab_size"])
    model = model_of(device)
    with torch.no_grad():
        found = float(loss_of(PackedPolicy(model, dtype="bfloat16"), move(packed, device)))
        fused = PackedPolicy(model, dtype="bfloat16")
        fused.fuse()
        also = float(loss_of(fused, move(packed, device)))
        expected = float(loss_of(PackedPolicy(model_of(device).cpu()), packed))
    for name, loss in (("plain", found), ("fused", also)):
        assert abs(loss - expected) < LOSS_TOLERANCE * abs(expected), (
            f"loss {loss} on the GPU ({name}), {expected} on the CPU"
        )
    return {"cpu_fp32": expected, "gpu_bf16": found, "gpu_bf16_fused": also}


def attention_ms(device: torch.device, kind: str) -> dict[str, float]:
    """Forward, and both passes, of one layer."""
    packed, length_S = sequences(TOKENS, SHAPE["vocab_size"])
    heads, kv_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    spans = spans_of(packed.families, device)
    tokens, longest = int(packed.input_1T.numel()), int(length_S.max())
    q, k, v = (
        torch.randn(tokens, n, 64, device=device, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    )  # fmt: skip
    grad = torch.randn_like(q)
    if kind == "flash":
        inputs = [x.transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        forward = lambda: attend_spans(*inputs, spans, 0.125)  # noqa: E731
        both = lambda: torch.autograd.grad(forward(), inputs, grad[None])  # noqa: E731
    else:
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        ends = (spans.starts, spans.starts, longest, longest)
        forward = lambda: torch.ops.aten._cudnn_attention_forward(  # noqa: E731
            q, k, v, None, *ends, True, 0.0, True, False, scale=0.125
        )

        def both() -> object:
            output, lse, *_, seed, offset, _ = forward()
            return torch.ops.aten._cudnn_attention_backward(
                grad, q, k, v, output, lse, seed, offset, None, *ends, 0.0, True, scale=0.125
            )

        expected = attend_spans(*(x.transpose(0, 1)[None] for x in (q, k, v)), spans, 0.125)[0]
        gap = float((forward()[0].view_as(expected) - expected).float().abs().max())
        assert gap < 0.05, f"cuDNN's attention is off by {gap}"
    return {"forward_ms": round(1e3 * seconds(forward, 10), 3), "both_ms": round(1e3 * seconds(both, 10), 3)}


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """What it returns, or what broke it, which the rest need not know."""
    try:
        found = work()
    except Exception as error:
        print(f"{what} FAILED\n{''.join(traceback.format_exc()[-3000:])}", flush=True)
        found = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
    gc.collect()
    torch.cuda.empty_cache()
    return found


def main(*, write: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use")
    device = torch.device("cuda", 0)
    ranks = Ranks.start(device)
    ceiling = matmul_ceiling(device)
    print(f"matmul {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        row = attempt(arm.name, lambda arm=arm: Training(arm, device, ranks).measure(ceiling))
        rows.append({"arm": arm.name} | row)
        print(json.dumps(rows[-1]), flush=True)
    found = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(), "tokens": TOKENS, "matmul_tflops": round(ceiling / 1e12, 1),
        "rows": rows, "same_loss_in_all_arms": agree(rows),
        "loss": attempt("the loss of the CPU", lambda: same_loss(device)),
    }  # fmt: skip
    if write:
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=2), flush=True)
    measured = [row for row in rows if "step_s" in row]
    if measured:
        fastest = min(measured, key=lambda row: row["step_s"])["arm"]
        attempt("the profile", lambda: look_into(next(arm for arm in ARMS if arm.name == fastest), device, ranks))
    for kind in ("flash", "cudnn"):
        print(kind, attempt(kind, lambda kind=kind: attention_ms(device, kind)), flush=True)
    ranks.stop()


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether all arms that ran had the same loss and gradient in their first step."""
    measured = [row for row in rows if "loss" in row]
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        values = [row[name] for row in measured]
        if not values or max(values) - min(values) > tolerance * abs(values[0]):
            return False
    return True


def look_into(arm: Arm, device: torch.device, ranks: Ranks) -> None:
    training = Training(arm, device, ranks)
    for _ in range(2):
        training.step()
    waits = training.waits()
    print(f"{arm.name}: the host waits {len(waits)} times in a step: {', '.join(waits[:12])}")
    print("\n".join(training.kernels()), flush=True)
