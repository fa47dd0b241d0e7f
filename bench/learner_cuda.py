"""What the learner does on one GPU, checked against the same on the CPU: run once on every new kind of machine.

    python bench/learner_cuda.py [--write]      bench/results/learner_cuda.json; exit code 1 where a check fails

ranks         NCCL in a world of one: a sum, a maximum, a broadcast; a weight group of the learner alone
step          an RL step of the default preset, groups with a common prompt of 700 tokens: loss and gradient in fp32,
              in bf16, with learner.compile, with prompts computed once and for each rollout, against fp32 on the CPU
batches       six batches of different shapes with learner.compile: how often something was compiled after the third
sharded       FSDP2 in a world of one, plain and fused
offload       weights and optimiser states to host memory and back: bytes that stay, weights and a further step
frozen        a reference model in host memory between its uses
resume        a step after a checkpoint was saved and loaded equals one without, bit for bit (deterministic kernels)
snapshot      weights in pinned staging, as engines get them: GB/s, and that they are the weights
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic kernels need, before CUDA starts

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stamp import commit
from train_step_cuda import attempt

from async_rl import config
from async_rl.learner import step as train_step
from async_rl.learner.distributed import Ranks
from async_rl.learner.frozen import Frozen
from async_rl.learner.offload import Offload
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.trainer import Learner
from async_rl.models.loading import build_model
from async_rl.weights.group import Forming, host_store
from async_rl.wire.messages import MicroBatches, Sequence, TrainRollout, VersionSpan

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "learner_cuda.json"
CHARACTERS = "".join(chr(code) for code in range(33, 33 + 61))
VOCABULARY = 64
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROMPT, GROUPS, MEMBERS = 700, 2, 8
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.06)}
"""dtype -> of the loss, relative to the mean weight of a token; of the gradient, relative to its norm."""
Checks = dict[str, Any]


def run_of(device: str, **learner: Any) -> config.Run:
    """Six layers of width 256: large enough for every path, and for fp32 on the CPU in seconds."""
    tiny = config.TinyModel(
        characters=CHARACTERS, hidden_size=256, layers=6, heads=4, kv_heads=2, intermediate_size=688, max_length=2048
    )
    return config.Run(
        steps=100,
        seed=1,
        model=config.Model(tiny=tiny),
        environment=config.Environment(name="sorting"),
        rollout=config.Rollout(groups_per_step=GROUPS, group_size=MEMBERS, max_new_tokens=512),
        optimizer=config.Optimizer(learning_rate=1e-3, clip_norm=0.0),
        learner=config.Learner(device=device, microbatch_tokens=32768, **learner),
    )


def batch(step: int, groups: int = GROUPS, prompt: int = PROMPT) -> MicroBatches:
    """Two micro-batches. Log-probs are near those of a model that knows nothing."""
    rng = np.random.default_rng(step)
    rollouts: list[TrainRollout] = []
    for group in range(groups):
        common = rng.integers(3, VOCABULARY, prompt + 8 * group)
        for member in range(MEMBERS):
            own = rng.integers(3, VOCABULARY, int(rng.integers(20, 400)))
            tokens = np.concatenate([common, own]).astype("<i4")
            logprobs = (-np.log(VOCABULARY) + rng.normal(0, 0.1, len(tokens))).astype("<f4")
            spans = [VersionSpan(len(common), len(tokens), step, step)]
            rollouts.append(
                TrainRollout(group, member, float(member % 3), [Sequence(tokens.tobytes(), logprobs.tobytes(), spans)])
            )
    half = len(rollouts) // 2
    return MicroBatches(step, step, rollouts, [[list(range(half)), list(range(half, len(rollouts)))]])


def gradient(learner: Learner) -> torch.Tensor:
    grads = [parameter.grad for parameter in learner.model.parameters()]
    return torch.cat([grad.detach().float().flatten().cpu() for grad in grads if grad is not None])


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten().cpu() for parameter in module.parameters()])


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_ranks(ranks: Ranks, scratch: Path) -> Checks:
    one = torch.ones(4, device=GPU)
    dist.all_reduce(one)
    dist.all_reduce(one, op=dist.ReduceOp.MAX)
    dist.broadcast(one, 0)
    host = torch.ones(1)
    dist.all_reduce(host)
    torch.cuda.synchronize()
    assert one.tolist() == [1.0] * 4 and host.item() == 1.0
    store, _ = host_store("127.0.0.1", 30.0)
    group = Forming(store, "127.0.0.1", 1, 0, ["learner"], 30.0).form(GPU)
    group.broadcast(one, "a tensor")
    group.drop()
    return {"backend": str(dist.get_backend()), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def check_step(ranks: Ranks, scratch: Path) -> Checks:
    arms: dict[str, tuple[str, dict[str, Any], bool]] = {
        "cpu": ("cpu", {"dtype": "float32"}, True),
        "float32": ("cuda", {"dtype": "float32"}, True),
        "float32, each its prompt": ("cuda", {"dtype": "float32"}, False),
        "bfloat16": ("cuda", {"dtype": "bfloat16"}, True),
        "bfloat16, each its prompt": ("cuda", {"dtype": "bfloat16"}, False),
        "bfloat16, compile": ("cuda", {"dtype": "bfloat16", "compile": True}, True),
        "bfloat16, compile, again": (
            "cuda", {"dtype": "bfloat16", "compile": True, "activation_checkpointing": True}, True
        ),
    }  # fmt: skip
    found: Checks = {}
    expected: tuple[float, torch.Tensor] | None = None
    pack = train_step.pack
    for name, (device, options, shared) in arms.items():
        train_step.pack = partial(pack, share_prompts=shared)
        host = Ranks(0, 1, CPU, 30.0)
        learner = Learner(run_of(device, **options), scratch / name, host if device == "cpu" else ranks)
        metrics = learner.train(batch(0))
        train_step.pack = pack
        assert not metrics["skipped"], name
        if expected is None:
            expected = metrics["loss"], gradient(learner)
        gaps = abs(metrics["loss"] - expected[0]), off(gradient(learner), expected[1])
        found[name] = {"loss": metrics["loss"], "loss_gap": gaps[0], "gradient_gap": gaps[1]}
        print(f"    {name}: loss {metrics['loss']:.6f}, gradient off by {gaps[1]:.1e}", flush=True)
        learner.close()
    for name, one in found.items():
        of_loss, of_gradient = TOLERANCES["bfloat16" if "bfloat16" in name else "float32"]
        assert one["loss_gap"] <= of_loss and one["gradient_gap"] <= of_gradient, f"{name}: {one}"
    return found


def check_batches(ranks: Ranks, scratch: Path) -> Checks:
    torch.compiler.reset()
    learner = Learner(run_of("cuda", dtype="bfloat16", compile=True), scratch / "run", ranks)
    graphs, seconds = [], []
    for step in range(6):
        began = time.monotonic()
        learner.train(batch(step, groups=2 + step % 3, prompt=100 + 50 * step))
        seconds.append(round(time.monotonic() - began, 2))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2:] == graphs[2:3] * 4, f"graphs after each step: {graphs}"
    return {"graphs": graphs, "step_s": seconds}


def check_sharded(ranks: Ranks, scratch: Path) -> Checks:
    losses: dict[str, list[float]] = {}
    micro = train_step.pack(train_step_batch(), range(2 * MEMBERS)).tokens
    tokens = train_step.move(micro, GPU)
    for name, shard, fuse in (("plain", False, False), ("sharded", True, False), ("sharded, compile", True, True)):
        policy = PackedPolicy(build_model(run_of("cuda").model, seed=1), dtype="bfloat16")
        if fuse:
            policy.fuse()
        if shard:
            policy.shard(ranks)
        else:
            policy.to(GPU)
        loss = -policy(tokens).logp_K.mean()
        loss.backward()
        grads = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
        local = [getattr(grad, "to_local", lambda grad=grad: grad)() for grad in grads]
        losses[name] = [float(loss), float(torch.stack([one.float().norm() for one in local]).norm())]
    for name, (loss, norm) in losses.items():
        expected = losses["plain"]
        assert abs(loss - expected[0]) < 0.01 and abs(norm - expected[1]) < 0.03 * expected[1], f"{name}: {losses}"
    return losses


def train_step_batch() -> Any:
    from async_rl.learner.batch import flatten

    return flatten(batch(0))


def check_offload(ranks: Ranks, scratch: Path) -> Checks:
    others = torch.cuda.memory_allocated()  # workspaces of cuBLAS among them
    learner = Learner(run_of("cuda", dtype="bfloat16"), scratch / "run", ranks)
    learner.train(batch(0))
    before, held_before = weights(learner.model), torch.cuda.memory_allocated() - others
    offload: Offload = learner.offload
    began = time.monotonic()
    offload.leave()
    left, held = time.monotonic() - began, torch.cuda.memory_allocated() - others
    assert all(not parameter.is_cuda for parameter in learner.model.parameters())
    began = time.monotonic()
    offload.enter()
    torch.cuda.synchronize()
    entered = time.monotonic() - began
    assert torch.equal(weights(learner.model), before)
    metrics = learner.train(batch(1))
    assert not metrics["skipped"]
    assert held < 0.5 * held_before, f"{held} of {held_before} bytes stay on the GPU"
    return {"bytes_before": held_before, "bytes_away": held, "leave_s": round(left, 3), "enter_s": round(entered, 3)}


def check_frozen(ranks: Ranks, scratch: Path) -> Checks:
    tokens = train_step.move(train_step.pack(train_step_batch(), range(2 * MEMBERS)).tokens, GPU)
    found: list[torch.Tensor] = []
    held: list[int] = []
    for offload in (False, True):
        before = torch.cuda.memory_allocated()
        policy = PackedPolicy(build_model(run_of("cuda").model, seed=1), dtype="bfloat16")
        frozen = Frozen(policy, GPU, dtype="bfloat16", offload=offload)
        for _ in range(2):
            with frozen.at_work():
                found.append(policy(tokens).logp_K)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before - 2 * found[-1].numel() * 4)
        del policy, frozen
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert held[1] < 0.2 * held[0], f"between uses {held[1]} bytes, {held[0]} where the model stays"
    return {"bytes_that_stay": held[0], "bytes_parked": held[1]}


def check_resume(ranks: Ranks, scratch: Path) -> Checks:
    """Kernels that are not deterministic may differ in the last bits, but the state that was loaded may not."""
    found: Checks = {}
    for strict in (True, False):
        torch.use_deterministic_algorithms(strict)
        try:
            gap, losses = resumed_gap(ranks, scratch / str(strict))
            assert gap == 0 if strict else gap < 1e-3, f"weights after the step are off by {gap:.1e}, losses {losses}"
            found["deterministic" if strict else "usual"] = {"gap": gap, "losses": losses}
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            found["deterministic"] = {"not possible": str(error)[:200]}
        finally:
            torch.use_deterministic_algorithms(False)
    return found


def resumed_gap(ranks: Ranks, directory: Path) -> tuple[float, list[float]]:
    run = run_of("cuda", dtype="bfloat16")
    learner = Learner(run, directory, ranks)
    for step in range(2):
        learner.train(batch(step))
    learner.save_checkpoint()
    learner.close()
    resumed = Learner(run, directory, ranks)
    assert resumed.version == 2
    assert torch.equal(weights(resumed.model), weights(learner.model)), "weights differ after loading"
    losses = [one.train(batch(2))["loss"] for one in (learner, resumed)]
    return off(weights(resumed.model), weights(learner.model)), losses


def check_snapshot(ranks: Ranks, scratch: Path) -> Checks:
    learner = Learner(run_of("cuda", dtype="bfloat16"), scratch / "run", ranks)
    staging = torch.zeros(learner.layout.nbytes, dtype=torch.uint8, pin_memory=True)
    learner.snapshot(staging)
    began = time.monotonic()
    learner.snapshot(staging)
    taken = time.monotonic() - began
    views = learner.layout.views(staging)
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(views[name], parameter.detach().to(views[name].dtype).cpu()), name
    return {"bytes": learner.layout.nbytes, "seconds": round(taken, 4)}


CHECKS: dict[str, Callable[[Ranks, Path], Checks]] = {
    "ranks": check_ranks, "step": check_step, "batches": check_batches, "sharded": check_sharded,
    "offload": check_offload, "frozen": check_frozen, "resume": check_resume, "snapshot": check_snapshot,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch can use")
    ranks = Ranks.start(GPU)
    found: Checks = {}
    for name in options.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = attempt(name, lambda name=name, scratch=scratch: CHECKS[name](ranks, Path(scratch)))
        verdict = "FAILED" if "failed" in found[name] else "ok"
        print(f"{name:10} {verdict:6} {time.monotonic() - began:5.1f} s  {json.dumps(found[name])[:600]}", flush=True)
    ranks.stop()
    if options.write:
        stamp = {
            "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        RESULT.write_text(json.dumps(stamp | found, indent=2) + "\n")
    if any("failed" in one for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
