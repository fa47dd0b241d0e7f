"""The embedded engine on one GPU: a random-initialised model of Qwen2.5-0.5B's shape in bf16.

    python bench/engine_cuda.py [--quick] [--write]      bench/results/engine_cuda.json

decode     tokens/s at batch 1, 8, 64, 256 (prompt 128, 256 new tokens), by way of computing steps (make_steps); its
           share of the bandwidth limit: bytes of weights and KV that a step has to read, over what a large copy on the
           same device moves (read + written). The second of two equal runs: the first one compiles and records.
same       tokens and log-probs beside eager steps and the learner's packed recompute, in float32 and bf16, sampled and
           greedy; weights swapped in mid-sequence.
engine     through its thread: groups of 8 with lognormal lengths; what a swap under way costs.
kernels    where the time of a step goes (torch.profiler).

A part that fails is recorded with its error, and the others go on; what there is is written after every part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stamp import commit
from train_step_cuda import SHAPE
from transformers import Qwen2Config, Qwen2ForCausalLM

from async_rl.engines.batcher import Batcher
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Chunk, Request, Snapshot
from async_rl.engines.static_steps import StaticSteps
from async_rl.wire.messages import WeightsId

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "engine_cuda.json"
DEVICE = torch.device("cuda", 0)
BATCHES = (1, 8, 64, 256)
KINDS = ("static", "eager", "fused")
"""Ways of computing steps (engines.make_steps). A kernel that breaks the CUDA context spoils what comes after it: ours
come last."""
PROMPT, NEW = 128, 256


def make_model(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()


def make_batcher(model: Any, kind: str, dtype: torch.dtype, slots: int, max_length: int = PROMPT + NEW) -> Batcher:
    steps: Any = kind
    batcher = Batcher(model.config, slots=slots, max_length=max_length, dtype=dtype, device=DEVICE, steps=steps)
    swap(batcher, model, 0)
    return batcher


def swap(batcher: Batcher, model: Any, version: int) -> None:
    batcher.swap(WeightsId(0, version), batcher.prepare(dict(model.named_parameters())))


def make_requests(count: int, new: int, *, temperature: float = 1.0, prompt: int = PROMPT) -> list[Request]:
    rng = random.Random(1)
    vocabulary = SHAPE["vocab_size"]
    prompts = [tuple(rng.randrange(vocabulary) for _ in range(prompt)) for _ in range(count)]
    return [
        Request(i, prompt, new, key=rng.getrandbits(63), temperature=temperature) for i, prompt in enumerate(prompts)
    ]


def finish(batcher: Batcher) -> dict[int, Chunk]:
    chunks: dict[int, Chunk] = {}
    while batcher.has_work:
        chunks |= {chunk.request_id: chunk for chunk in batcher.step()}
    return chunks


def bandwidth() -> float:
    """Bytes a second, read + written, of a copy of 2 GiB; the best of a few."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() / (start.elapsed_time(end) / 1e3))
    return best


# --- decode -----------------------------------------------------------------------------------------------------


def decode_rate(batcher: Batcher, batch: int, new: int) -> float:
    """Seconds of a decode step, admission apart."""
    batcher.submit(make_requests(batch, new))
    while len(batcher.sampled()) < batch:
        batcher.step()
    for _ in range(3):
        batcher.step()
    sampled = next(iter(batcher.sampled().values()))
    torch.cuda.synchronize()
    started = time.perf_counter()
    while batcher.has_work:
        batcher.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / (new - sampled)


def decode(model: Any, speed: float, kinds: Sequence[str], new: int) -> list[dict[str, Any]]:
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())  # tied: the head is the embedding
    kv_bytes = 2 * 2 * SHAPE["num_key_value_heads"] * 64 * SHAPE["num_hidden_layers"]
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        for batch in BATCHES:
            row: dict[str, Any] = {"batch": batch, "steps": kind}
            rows.append(row)
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                batcher = make_batcher(model, kind, torch.bfloat16, batch)
                count = new // 4 if kind == "eager" else new
                started = time.perf_counter()
                decode_rate(batcher, batch, count)
                first_s = time.perf_counter() - started
                step_s = decode_rate(batcher, batch, count)
                limit_s = (weight_bytes + kv_bytes * batch * (PROMPT + count / 2)) / speed
                row |= {
                    "step_ms": round(step_s * 1e3, 4), "tokens_per_s": round(batch / step_s),
                    "share_of_limit": round(limit_s / step_s, 3), "first_run_s": round(first_s, 2),
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), **graphs_of(batcher),
                }  # fmt: skip
                del batcher
            except Exception as error:
                row["error"] = said(error)
            print(json.dumps(row), flush=True)
    return rows


def graphs_of(batcher: Batcher) -> dict[str, float]:
    steps: Any = batcher._steps
    if not isinstance(steps, StaticSteps):
        return {}
    graphs: Any = steps._recorder
    return {"graphs": graphs.captured, "capture_s": round(graphs.capture_s, 3)}


def generate(model: Any, batch: int, new: int) -> dict[str, Any]:
    """transformers, for comparison."""
    half = Qwen2ForCausalLM(model.config).to(DEVICE, torch.bfloat16).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, PROMPT), device=DEVICE)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    times: list[float] = []
    for count in (4, new):
        options |= {"min_new_tokens": count, "max_new_tokens": count}
        torch.cuda.synchronize()
        started = time.perf_counter()
        half.generate(ids, attention_mask=torch.ones_like(ids), **options)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    step_s = (times[1] - times[0]) / (new - 4)
    return {"batch": batch, "steps": "transformers generate", "step_ms": round(step_s * 1e3, 3)}


# --- same -------------------------------------------------------------------------------------------------------


def learner_logprobs(model: Any, dtype: str, requests: Sequence[Request], chunks: dict[int, Chunk]) -> list[np.ndarray]:
    """The packed learner's, of the sampled tokens of every request."""
    from async_rl.learner.packing import Sequences, move, pack_sequences
    from async_rl.learner.policy import PackedPolicy

    tokens = [np.array([*request.prompt, *chunks[request.id].tokens], dtype=np.int32) for request in requests]
    lengths = np.array([len(one) for one in tokens])
    trained = [np.arange(len(one)) >= len(r.prompt) for r, one in zip(requests, tokens, strict=True)]
    of = Sequences.of(np.concatenate(tokens), np.concatenate(trained), lengths)
    everyone = np.arange(len(tokens))
    packed = move(pack_sequences(of, everyone, np.zeros_like(everyone)).tokens, DEVICE)
    with torch.no_grad():
        logp_K = PackedPolicy(model, dtype=dtype)(packed).logp_K.float().cpu().numpy()
    return np.split(logp_K, np.cumsum([len(chunks[request.id].tokens) for request in requests])[:-1])


def compare(chunks: dict[int, Chunk], expected: dict[int, Chunk]) -> dict[str, Any]:
    """Tokens up to the first difference, and log-probs of those."""
    shared, total, gaps = 0, 0, [np.zeros(1)]
    for i, chunk in chunks.items():
        other = expected[i]
        differs = np.flatnonzero(chunk.tokens != other.tokens)
        until = int(differs[0]) if len(differs) else len(chunk.tokens)
        shared, total = shared + until, total + len(chunk.tokens)
        gaps.append(np.abs(chunk.logprobs[:until] - other.logprobs[:until]))
    gap = np.concatenate(gaps)
    return {"tokens_same": f"{shared}/{total}", "logp_gap_max": float(gap.max()), "logp_gap_mean": float(gap.mean())}


def same(model: Any, other: Any, kinds: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for temperature in (0.0, 1.0, 0.7):
            requests = make_requests(5, 48, temperature=temperature, prompt=300)  # crosses a bucket of lengths
            found: dict[str, dict[int, Chunk]] = {}
            for kind in kinds:
                row: dict[str, Any] = {"dtype": name, "temperature": temperature, "steps": kind}
                rows.append(row)
                try:
                    batcher = make_batcher(model, kind, dtype, 5, max_length=1024)
                    batcher.submit(requests)
                    found[kind] = finish(batcher)
                    if "eager" in found:
                        row |= compare(found[kind], found["eager"])
                    if temperature in (0.0, 1.0):
                        expected = np.concatenate(learner_logprobs(model, name, requests, found[kind]))
                        logprobs = np.concatenate([found[kind][r.id].logprobs for r in requests])
                        gap = np.abs(logprobs - expected)
                        row |= {"learner_gap_max": float(gap.max()), "learner_gap_mean": float(gap.mean())}
                except Exception as error:
                    row["error"] = said(error)
                print(json.dumps(row), flush=True)
    rows.append(swapped(model, other, kinds))
    print(json.dumps(rows[-1]), flush=True)
    return rows


def swapped(model: Any, other: Any, kinds: Sequence[str]) -> dict[str, Any]:
    found: dict[str, dict[int, Chunk]] = {}
    row: dict[str, Any] = {"swap": "float32, after 12 of 24 steps"}
    for kind in kinds:
        batcher = make_batcher(model, kind, torch.float32, 5, max_length=1024)
        batcher.submit(make_requests(5, 24))
        for _ in range(12):
            batcher.step()
        swap(batcher, other, 1)
        found[kind] = finish(batcher)
        row[kind] = compare(found[kind], found["eager"])
        row[kind]["spans_same"] = all(found[kind][i].spans == found["eager"][i].spans for i in found[kind])
        row[kind]["versions"] = sorted({span.version for chunk in found[kind].values() for span in chunk.spans})
    return row


# --- engine -----------------------------------------------------------------------------------------------------


async def engine(model: Any) -> dict[str, Any]:
    """256 slots, 64 groups of 8 of lognormal length; weights come from the host and from the device meanwhile."""
    rng = random.Random(3)
    device_engine = EmbeddedEngine(model.config, slots=256, max_length=1024, dtype=torch.bfloat16, device=str(DEVICE))
    host = {name: p.detach().to("cpu", torch.bfloat16).pin_memory() for name, p in model.named_parameters()}
    near = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    ended, tokens, want = threading.Event(), [0, 0], [0]

    def deliver(chunks: Sequence[Chunk]) -> None:
        tokens[0] += sum(len(chunk.tokens) for chunk in chunks)
        tokens[1] += len(chunks)
        if tokens[1] >= want[0]:
            ended.set()

    device_engine.start(deliver)
    found: dict[str, Any] = {}
    await device_engine.load_weights(Snapshot(WeightsId(0, 0), host))
    for run in range(2):
        requests: list[Request] = []
        for group in make_requests(64, 1):
            for _ in range(8):
                new = max(8, min(800, round(200 * rng.lognormvariate(0, 0.6))))
                requests.append(Request(len(requests), group.prompt, new, key=rng.getrandbits(63)))
        ended.clear()
        tokens[:], want[0] = [0, 0], len(requests)
        started = time.perf_counter()
        device_engine.submit(requests)
        if run:
            for where, tensors in (("host", host), ("device", near), ("host", host), ("device", near)):
                asked = time.perf_counter()
                swap = await device_engine.load_weights(Snapshot(WeightsId(0, run), tensors))
                found.setdefault(f"load_from_{where}_s", []).append(round(time.perf_counter() - asked, 4))
                found.setdefault(f"stall_from_{where}_ms", []).append(round(swap.stall_s * 1e3, 3))
        await asyncio.to_thread(ended.wait, 60)
        seconds = time.perf_counter() - started
        found[f"run_{run}"] = {
            "tokens": tokens[0],
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens[0] / seconds),
        }
    before = torch.cuda.memory_reserved()
    left = await device_engine.release()
    found["released_gib"] = [round(before / 2**30, 3), round(left.nbytes / 2**30, 3)]
    back = time.perf_counter()
    await device_engine.load_weights(Snapshot(WeightsId(0, 9), host))
    found["back_s"] = round(time.perf_counter() - back, 3)
    await device_engine.stop()
    await device_engine.wait_stopped()
    return found


# --- kernels ----------------------------------------------------------------------------------------------------


def kernels(model: Any, batch: int, kind: str, steps: int = 20) -> list[str]:
    batcher = make_batcher(model, kind, torch.bfloat16, batch)
    batcher.submit(make_requests(batch, NEW))
    for _ in range(10):
        batcher.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            batcher.step()
        torch.cuda.synchronize()
        taken = time.perf_counter() - started
    rows = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in rows)
    lines = [
        f"{kind}, batch {batch}: {taken / steps * 1e3:.3f} ms a step profiled, kernels {busy / steps / 1e3:.3f} ms"
    ]
    for e in rows[:20]:
        mean = e.self_device_time_total / e.count
        lines.append(
            f"{e.self_device_time_total / steps:9.1f} us/step {e.count / steps:6.1f} x {mean:8.2f} us  {e.key[:90]}"
        )
    host = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:6]
    lines += [f"host {e.self_cpu_time_total / steps:9.1f} us/step {e.count / steps:6.1f} x  {e.key[:60]}" for e in host]
    return lines


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-1500:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 new tokens, no eager rates")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    parser.add_argument("--out", type=Path, help="write them here as well")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch can use")
    torch.cuda.set_device(DEVICE)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    new = 64 if options.quick else NEW
    model, other = make_model(), make_model(2)
    speed = statistics.median(bandwidth() for _ in range(3))
    torch.cuda.empty_cache()
    found["copy_gb_per_s"] = round(speed / 1e9)
    print(found, flush=True)
    compared = ["eager", *(kind for kind in options.kinds if kind != "eager")]
    paths = [*([RESULT] if options.write else []), *([options.out] if options.out else [])]

    def attempt(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        try:
            found[name] = work()
        except Exception as error:
            found[name] = {"error": said(error)}
            print(f"{name} FAILED\n{found[name]['error']}", flush=True)
        torch.cuda.empty_cache()
        print(f"--- {name}: {time.perf_counter() - started:.1f} s", flush=True)
        for path in paths:  # what is there, should the next one never end
            path.write_text(json.dumps(found, indent=2) + "\n")

    attempt("decode", lambda: decode(model, speed, options.kinds, new))
    attempt("same", lambda: same(model, other, compared))
    for batch in (1, 64):
        for kind in [kind for kind in ("fused", "static") if kind in options.kinds]:
            attempt(f"kernels_{kind}_{batch}", lambda batch=batch, kind=kind: kernels(model, batch, kind))
            print("\n".join(found[f"kernels_{kind}_{batch}"]), flush=True)
    attempt("engine", lambda: asyncio.run(engine(model)))
    print(json.dumps(found["engine"], indent=1), flush=True)
    if not options.quick:
        attempt("transformers", lambda: generate(model, 64, 64))


if __name__ == "__main__":
    main()
