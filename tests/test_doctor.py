"""`async-rl doctor`: real faults, injected from outside, must come out under their names."""

from __future__ import annotations

import dataclasses
import doctest
import resource
import socket
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from async_rl import config, recipes
from async_rl.config import Rewards, Run, TinyModel
from async_rl.doctor import check as check_module
from async_rl.doctor import machine
from async_rl.doctor.check import Check, line
from async_rl.doctor.diagnosis import Draws, Gap, Observations, diagnose
from async_rl.doctor.examine import examine, numerics_check
from async_rl.doctor.footprint import footprint
from async_rl.doctor.numerics import NothingSampled, observe, of_recipe
from async_rl.engines import decoding
from async_rl.engines.draw import draw
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Request, Snapshot, Swap
from async_rl.errors import UserError
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.lora import add_adapters
from async_rl.learner.saved_parts import Part
from async_rl.models.loading import build_model
from async_rl.models.tiny import tiny_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SORT = ROOT / "recipes" / "sort.toml"
TINY = TinyModel(characters="0123456789=", hidden_size=32, intermediate_size=64, kv_heads=2, max_length=64)
LONG = ["environment.options.digits=16", "rollout.max_new_tokens=16", "generator.max_length=0"]
Fault = Callable[[EmbeddedEngine], Any]
"""What is done to a new engine before it starts; it may return another one in its place."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sort recipe on a model whose weights are large enough for its distributions to be uneven."""
    folder = tmp_path_factory.mktemp("doctor")
    architecture = tiny_config(TINY)
    architecture.initializer_range = 0.2
    torch.manual_seed(5)
    LlamaForCausalLM(architecture).save_pretrained(folder / "model")
    tiny_tokenizer(TINY).save_pretrained(folder / "model")
    path = folder / "sort.toml"
    head, _, tail = SORT.read_text().partition("[model.tiny]")
    path.write_text(head + '[model]\npath = "model"\n\n[environment]' + tail.partition("[environment]")[2])
    return path


def load(recipe: Path, *overrides: str) -> Run:
    return recipes.load(recipe, [*LONG, *overrides])


def cause(run: Run, fault: Fault | None = None, dtype: str | None = None) -> tuple[str, Observations]:
    """dtype: of engines that should have the recipe's."""

    def make(asked: str | None) -> Any:
        engine = of_recipe(run, Path("/nowhere"))(asked or dtype)
        assert isinstance(engine, EmbeddedEngine)
        return (fault(engine) if fault else None) or engine

    observations = observe(run, make)
    return diagnose(observations).cause, observations


class Wrapped:
    """An engine that does something to what passes."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class AnotherTemperature(Wrapped):
    def submit(self, requests: Sequence[Request]) -> None:
        self._engine.submit([dataclasses.replace(one, temperature=0.7) for one in requests])


class OtherWeights(Wrapped):
    async def load_weights(self, snapshot: Snapshot) -> float:
        name = "model.layers.1.mlp.down_proj.weight"
        other = ChainMap({name: snapshot.tensors[name] * 1.5}, dict(snapshot.tensors))
        return await self._engine.load_weights(Snapshot(snapshot.weights, other))


class LoadsOnce(Wrapped):
    async def load_weights(self, snapshot: Snapshot) -> Swap:
        if self._engine.weights is None:
            return await self._engine.load_weights(snapshot)
        return Swap(0.0)


def keeps_prompts(engine: EmbeddedEngine) -> None:
    """Prompts are always computed with the first weights."""
    prefill, first = engine._batcher._prefill, list[Any]()

    def stale(live: Any, *arguments: Any) -> Any:
        first.append(live)
        return prefill(first[0], *arguments)

    engine._batcher._prefill = stale


def spoils_cache(engine: EmbeddedEngine) -> None:
    read = engine._batcher._cache.read

    def half(*arguments: Any) -> Any:
        keys, values = read(*arguments)
        return keys, values * 0.5

    engine._batcher._cache.read = half


def spoils_prefill(engine: EmbeddedEngine) -> None:
    """The KV cache stays right."""
    prefill = engine._batcher._prefill

    def shifted(*arguments: Any) -> Any:
        logits = prefill(*arguments)
        return logits.roll(1, dims=-1)

    engine._batcher._prefill = shifted


def likeliest(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf outside the smallest set of tokens whose mass is top_p or more."""
    p, order = logits.softmax(-1).sort(descending=True)
    dropped = p.cumsum(-1) - p >= top_p
    return logits.masked_fill(dropped.gather(1, order.argsort(-1)), float("-inf"))


def test_engine_and_learner_agree(recipe: Path) -> None:
    for overrides in ([], ["rollout.temperature=0.7"], ["learner.microbatch_tokens=70"], ["rollout.group_size=1"]):
        found, observations = cause(load(recipe, *overrides))
        assert found == "none" and observations.gap.max < 1e-4 and observations.gap.tokens > 200
        assert observations.first.tokens > 0 and observations.later.tokens > 0 and observations.prompts_survive
        assert observations.fresh_engine is None, "nothing is tried where nothing is wrong"


def test_bfloat16_is_no_fault_where_the_recipe_says_so(recipe: Path) -> None:
    both = ["generator.dtype=bfloat16", "learner.dtype=bfloat16"]
    for overrides in (both, both[:1], both[1:]):
        found, observations = cause(load(recipe, *overrides))
        assert found == "none" and 1e-3 < observations.gap.mean < 0.06


def test_bfloat16_where_the_recipe_says_float32(recipe: Path) -> None:
    found, observations = cause(load(recipe), dtype="bfloat16")
    assert found == "dtype" and observations.float32_engine is not None and observations.float32_engine.mean < 1e-5


def test_the_engine_samples_at_another_temperature(recipe: Path) -> None:
    found, observations = cause(load(recipe), AnotherTemperature)
    assert found == "temperature" and observations.best_temperature == pytest.approx(0.7, abs=1e-3)
    assert "temperature 0.70, the learner computes them at 1" in numerics_check(observations).detail


def test_log_probs_before_the_temperature(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As servers report them unless told otherwise."""

    def raw(logits: torch.Tensor, uniforms: torch.Tensor, *temperature: Any) -> Any:
        tokens, _ = draw(logits, uniforms, *temperature)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(decoding, "draw", raw)
    found, observations = cause(load(recipe, "rollout.temperature=0.7"))
    assert found == "temperature" and observations.best_temperature == pytest.approx(1.0, abs=1e-3)


def test_tokens_of_another_temperature_than_their_log_probs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(logits: torch.Tensor, uniforms: torch.Tensor, *_: Any) -> Any:
        tokens, _ = draw(logits / 0.6, uniforms)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(decoding, "draw", cold)
    found, observations = cause(load(recipe))
    assert found == "temperature" and observations.gap.max < 1e-4
    assert observations.best_draws is not None and observations.best_draws.temperature == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("renormalised", [True, False])
def test_top_p(recipe: Path, monkeypatch: pytest.MonkeyPatch, renormalised: bool) -> None:
    def truncated(logits: torch.Tensor, uniforms: torch.Tensor, *_: Any) -> Any:
        tokens, logprobs = draw(likeliest(logits, 0.8), uniforms)
        return tokens, logprobs if renormalised else logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(decoding, "draw", truncated)
    found, observations = cause(load(recipe))
    assert found == "truncation" and (observations.gap.max > 0.01) is renormalised


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OtherWeights, "weights"),
        (LoadsOnce, "stale_weights"),
        (keeps_prompts, "stale_cache"),
        (spoils_cache, "kv_cache"),
        (spoils_prefill, "prefill"),
    ],
)
def test_what_is_wrong_in_the_engine(recipe: Path, fault: Fault, expected: str) -> None:
    found, observations = cause(load(recipe), fault)
    assert found == expected
    check = numerics_check(observations)
    assert check.status == "FAIL" and check.detail.startswith(expected) and check.data["cause"] == expected


GOOD = Gap(tokens=100, mean=1e-7, max=1e-6, k3=1e-14, outside=0.0)
BAD = Gap(tokens=100, mean=0.4, max=3.0, k3=0.3, outside=0.5)
BETWEEN = Gap(tokens=100, mean=0.03, max=0.3, k3=1e-3, outside=0.01)
EVEN, UNEVEN = Draws(1.0, 0.8, 0.4), Draws(1.0, 6.0, 1e-30)
OFF = Observations(
    engine_dtype="float32",
    learner_dtype="float32",
    temperature=1.0,
    gap=BAD,
    first=BAD,
    later=BAD,
    draws=EVEN,
    prompts_survive=True,
    best_temperature=0.9,
    at_best_temperature=BAD,
    older_weights=BAD,
    renormalised=0.3,
    fresh_engine=BAD,
    float32_engine=BAD,
    float32_learner=BAD,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "weights"),
        ({"prompts_survive": False}, "tokenizer"),
        ({"gap": GOOD}, "none"),
        ({"gap": GOOD, "draws": UNEVEN}, "truncation"),
        ({"gap": GOOD, "draws": UNEVEN, "best_draws": EVEN}, "temperature"),
        ({"gap": GOOD, "draws": UNEVEN, "best_draws": UNEVEN}, "truncation"),
        ({"at_best_temperature": GOOD}, "temperature"),
        ({"older_weights": GOOD}, "stale_weights"),
        ({"renormalised": 1.0}, "truncation"),
        ({"gap": BETWEEN, "float32_engine": GOOD}, "dtype"),
        ({"gap": BETWEEN, "learner_dtype": "bfloat16"}, "none"),
        ({"learner_dtype": "bfloat16", "float32_learner": GOOD}, "dtype"),
        ({"fresh_engine": GOOD, "float32_engine": GOOD}, "stale_cache"),
        ({"first": GOOD}, "kv_cache"),
        ({"later": GOOD}, "prefill"),
        ({"later": msgspec.structs.replace(GOOD, tokens=0)}, "weights"),
        ({"gap": msgspec.structs.replace(GOOD, mean=float("nan"))}, "weights"),
    ],
)
def test_patterns(changes: dict[str, Any], expected: str) -> None:
    assert diagnose(msgspec.structs.replace(OFF, **changes)).cause == expected


def test_rounding_that_the_recipe_asks_for_is_no_failure() -> None:
    noisy = msgspec.structs.replace(OFF, gap=msgspec.structs.replace(BETWEEN, mean=0.07), float32_engine=GOOD)
    assert numerics_check(noisy).status == "FAIL"
    assert numerics_check(msgspec.structs.replace(noisy, engine_dtype="bfloat16")).status == "warn"


gaps = st.sampled_from([GOOD, BAD, BETWEEN, None])


@given(gaps, gaps, gaps, gaps, gaps, st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_agreement_is_never_a_fault_and_disagreement_always_one(
    temperature: Any, older: Any, fresh: Any, engine: Any, learner: Any, dtype: str, survive: bool
) -> None:
    tried = msgspec.structs.replace(
        OFF,
        learner_dtype=dtype,
        at_best_temperature=temperature,
        older_weights=older,
        fresh_engine=fresh,
        float32_engine=engine,
        float32_learner=learner,
        prompts_survive=survive,
    )
    assert diagnose(tried).cause != "none"
    assert diagnose(msgspec.structs.replace(tried, gap=GOOD)).cause == "none"


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(check_module).failed == 0


# --- the machine ------------------------------------------------------------------------------------------------------


def test_software(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {check.name: check for check in machine.software()}
    assert {"python", "torch", "transformers", "pyzmq", "lmdb", "extra wandb", "extra gguf"} <= found.keys()
    assert all(check.status == "ok" for check in found.values()), found
    assert "with libzmq" in found["pyzmq"].detail
    needed = [
        "numpy>=999.1",
        "surely-absent>=2",
        "lmdb>=1",
        'surely-absent; extra == "trackio"',
        'x>=1; extra == "dev"',
    ]
    monkeypatch.setattr(machine.metadata, "requires", lambda _: needed)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    found = {check.name: check for check in machine.software()}
    assert found["numpy"].status == "FAIL" and "too old: pip install 'numpy>=999.1'" in found["numpy"].detail
    assert found["surely-absent"].status == "FAIL" and "pip install" in found["surely-absent"].detail
    assert found["lmdb"].status == "FAIL" and "cannot be imported" in found["lmdb"].detail
    trackio = found["extra trackio"]
    assert trackio.status == "ok" and "not installed (pip install 'async-rl[trackio]')" in trackio.detail
    assert "extra dev" not in found


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.cores(None).status == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", str(machine.available_cores() + 1))
    assert machine.cores(None).status == "warn"


def test_room(tmp_path: Path) -> None:
    assert machine.shared_memory(1 << 60, tmp_path).status == "warn"
    assert "--shm-size=" in machine.shared_memory(1 << 60, tmp_path).detail
    assert machine.shared_memory(1, tmp_path).status == "ok"
    assert "No such file" in machine.shared_memory(1, tmp_path / "none").detail
    run = tmp_path / "not" / "yet"
    assert machine.disk(run, 1 << 60, 1).status == "FAIL" and str(tmp_path) in machine.disk(run, 1, 1).detail
    assert machine.disk(run, 1, 1 << 60).status == "warn" and machine.disk(run, 1, 1).status == "ok"
    available = machine.available_memory()
    assert available > 1 << 20
    assert [machine.memory(need, 1000).status for need in (0, 700, 900, 1100)] == ["ok", "ok", "warn", "FAIL"]


def test_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[0] < 1024 or machine.descriptors().status == "ok"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert machine.descriptors().status == "warn" and "ulimit -n" in machine.descriptors().detail
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_ports() -> None:
    assert [check.status for check in machine.ports(None)] == ["ok"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = machine.ports(recipes.load(SORT, [f"controller.admin_port={port}"]))
        assert [check.status for check in busy] == ["ok", "FAIL"] and f"controller.admin_port = {port}" in busy[
            1
        ].detail
        before = machine.ports(recipes.load(SORT, [f"controller.port={port - 1}"]))
        assert before[2].status == "FAIL", "the training stream takes the next port"
    free = machine.ports(recipes.load(SORT, [f"controller.admin_port={port}"]))
    assert [check.status for check in free] == ["ok", "ok"]


def test_addresses_of_weights_and_servers() -> None:
    def found(*sets: str) -> list[tuple[str, str]]:
        return [(check.status, check.detail) for check in machine.ports(recipes.load(SORT, sets))][1:]

    (wrong,) = found("weights.host=nosuchhost.invalid", "weights.relay_port=22")
    assert wrong[0] == "FAIL" and wrong[1].startswith("weights.host = 'nosuchhost.invalid': cannot listen there (")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        relay = f"weights.relay_port={taken.getsockname()[1]}"
        (busy,) = found("weights.transport=http", relay)
        assert busy[0] == "FAIL" and busy[1].startswith(relay.replace("=", " = ") + ": cannot listen on 127.0.0.1 (")
        assert found(relay) == [], "on loopback nothing listens there"
    assert found("weights.transport=http", relay) == [("ok", relay.replace("=", " = ") + " is free on 127.0.0.1")]
    (wrong,) = found("generator.engine=sglang", "generator.sglang.host=203.0.113.5")
    assert wrong[0] == "FAIL" and wrong[1].startswith("generator.sglang.host = '203.0.113.5': cannot listen there")
    assert found("generator={engine='sglang', sglang={host='203.0.113.5', load_by='disk'}}") == []


def test_programs() -> None:
    unsafe = machine.programs(Rewards(unsafe_code=True))
    assert unsafe.status == "ok" and unsafe.detail.startswith("programs of a model (rewards.code) run by ")
    assert "without isolation" in unsafe.detail
    broken = machine.programs(Rewards(python="/bin/false"))
    assert broken.status == "warn" and "rewards.python = '/bin/false'" in broken.detail


def test_syncing(tmp_path: Path) -> None:
    check = machine.syncing(tmp_path / "run")
    assert check.status in ("ok", "warn") and "ms to sync a write" in check.detail and not list(tmp_path.iterdir())
    assert machine.syncing(Path("/proc/run")).status == "FAIL"


# --- a recipe on the machine ------------------------------------------------------------------------------------------


def test_footprint_of_what_is_shared_adapted_or_computed_again(recipe: Path) -> None:
    plain = footprint(load(recipe))
    shared = footprint(load(recipe, "learner.ranks=2", "learner.sharding=full"))
    assert shared.models["policy"] == plain.models["policy"] // 2 and shared.checkpoint == plain.checkpoint
    assert plain.kept == 4 * plain.parameters == 2 * shared.kept
    assert footprint(load(recipe, "staleness.max_staleness=0")).kept == 0
    assert footprint(load(recipe, "learner.mismatch_steps=0")).kept == 0
    again = footprint(load(recipe, "learner.activation_checkpointing=true"))
    assert again.learner < plain.learner and again.models == plain.models
    run = load(recipe, "learner.lora={rank=2}")
    model = build_model(run.model, seed=1)
    lora = run.learner.lora
    assert lora is not None
    add_adapters(model, lora, seed=1, base="")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert footprint(run).models["policy"] == 4 * plain.parameters + 16 * trained
    assert footprint(run).kept == 4 * trained


def test_footprint_against_real_files_and_processes(recipe: Path, tmp_path: Path) -> None:
    run = load(recipe)
    estimate = footprint(run)
    model = LlamaForCausalLM.from_pretrained(run.model.path)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    optimizer.step()
    position = checkpoint.Position(1, 0, 1, 1)
    alone = Ranks(0, 1, torch.device("cpu"), timeout_s=1.0)
    path = checkpoint.save(tmp_path, position, [Part("", model, optimizer)], tiny_tokenizer(TINY), alone, keep=1)
    tensors = [path / "model.safetensors", path / "optimizer.safetensors"]
    assert estimate.checkpoint == pytest.approx(sum(file.stat().st_size for file in tensors), rel=0.1)
    assert estimate.parameters == model.num_parameters() and estimate.sequence_tokens == 64
    assert estimate.snapshot == pytest.approx(4 * estimate.parameters, rel=0.05)
    low = footprint(load(recipe, "generator.dtype=bfloat16"))
    assert low.snapshot == pytest.approx(estimate.snapshot / 2, rel=0.05) and low.generator < estimate.generator
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    twice = estimate.by_device(load(recipe, "generator.count=2"), cpu, cpu)["cpu"]
    assert twice > estimate.by_device(run, cpu, cpu)["cpu"] + estimate.generator
    split = estimate.by_device(run, cuda, cuda)
    assert split["cuda"] == estimate.generator + estimate.learner and split["cpu"] < twice
    assert footprint(load(recipe, "controller.keep_rollouts=all")).ledger > estimate.ledger
    shared = load(recipe, "placement=colocated")
    in_turns = estimate.by_device(shared, cuda, cuda)
    assert in_turns["cuda"] == max(estimate.generator, estimate.learner)
    assert in_turns["cpu"] - split["cpu"] == estimate.resting == 12 * estimate.parameters
    on_cpu = [estimate.by_device(one, cpu, cpu)["cpu"] for one in (shared, run)]
    assert on_cpu[1] - on_cpu[0] == min(estimate.generator, estimate.learner - estimate.resting)


def checks(run: Run | None, directory: Path) -> dict[str, Check]:
    made: Generator[Check] = examine(run, directory)
    return {check.name: check for check in made}


def test_without_a_recipe(tmp_path: Path) -> None:
    found = checks(None, tmp_path)
    assert {"python", "cores", "ports", "sync", "gpu", "memory", "disk"} <= found.keys() and "numerics" not in found
    assert not [check for check in found.values() if check.status == "FAIL"]
    assert all(line(check).startswith(check.status) for check in found.values())


def test_with_a_recipe(tmp_path: Path) -> None:
    found = checks(recipes.load(SORT), tmp_path)
    assert not [check for check in found.values() if check.status == "FAIL"]
    numerics = found["numerics"]
    assert numerics.data["cause"] == "none" and numerics.data["observations"]["gap"]["tokens"] > 500
    assert "256 held-out tasks" in found["environment"].detail and "prompts survive" in found["tokenizer"].detail
    assert found["memory"].data["footprint"]["parameters"] > 100_000
    msgspec.json.encode(list(found.values()))


@pytest.mark.processes
def test_the_command(tmp_path: Path) -> None:
    """Lines or JSON on stdout, nothing on stderr, exit code 1 where something fails."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "async_rl.cli", "doctor", str(SORT), "--run-dir", str(tmp_path), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    found = run("--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert msgspec.json.decode(found.stdout, type=list[Check])[-1].name == "numerics"
    failed = run("--set", "generator.device=cuda:77")
    assert failed.returncode == 1 and "FAIL  recipe" in failed.stdout


@pytest.mark.parametrize(
    ("override", "name", "says"),
    [
        ("generator.device=cuda:77", "recipe", "generator.device = 'cuda:77'"),
        ("environment.options.digits=99", "recipe", "digits = 99: write 2 to 32"),
        ('report_to=["trackio"]', "recipe", "pip install 'async-rl[trackio]'"),
        ("rollout.max_new_tokens=15", "episodes", "every one of them failed: ValueError: request"),
        ("learner.microbatch_tokens=5", "recipe", "learner.microbatch_tokens = 5: a rollout of"),
    ],
)
def test_what_is_wrong_with_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, name: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    sets = [override, "environment.options.digits=15"] if name == "episodes" else [override]
    found = checks(recipes.load(SORT, sets), tmp_path)
    assert found[name].status == "FAIL" and says in found[name].detail


SGLANG = ["generator.engine=sglang", "generator.sglang.python=server"]


def test_the_log_of_a_server_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check names can be read afterwards; what the server would have read is gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server").write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo {"x" * 50} {"y" * 50}\n[ "$1" = -c ]\n')
    (tmp_path / "server").chmod(0o755)
    check = checks(recipes.load(SORT, SGLANG), Path("runs"))["recipe"]
    log = tmp_path / "runs" / "doctor-sglang.log"
    assert check.status == "FAIL" and f"see {log}, which ends: xxx" in check.detail
    assert log.read_text().startswith("xxx") and list(log.parent.iterdir()) == [log]
    (tmp_path / "file").write_text("")
    check = checks(recipes.load(SORT, SGLANG), tmp_path / "file")["recipe"]
    assert check.status == "FAIL" and "file: cannot be written" in check.detail


def test_attached_servers_are_asked_for(tmp_path: Path) -> None:
    """Nothing is loaded into them unless that was said; then they are waited for, but not for long."""
    sets = ["generator={engine='sglang', sglang={attach=['http://127.0.0.1:9'], start_s=0.1}}"]
    check = checks(recipes.load(SORT, sets), tmp_path)["numerics"]
    assert check.status == "warn" and "were not compared" in check.detail and "--attached" in check.detail
    server = checks(recipes.load(SORT, sets), tmp_path)["server"]
    assert server.status == "FAIL" and "attach = 'http://127.0.0.1:9': SGLang server" in server.detail
    found = {check.name: check for check in examine(recipes.load(SORT, sets), tmp_path, attached=True)}
    assert found["recipe"].status == "FAIL" and "attach = 'http://127.0.0.1:9': nothing" in found["recipe"].detail


def test_nothing_is_sampled(recipe: Path, tmp_path: Path) -> None:
    run = recipes.load(SORT, ["environment.options.digits=15", "rollout.max_new_tokens=15"])
    with pytest.raises(NothingSampled, match="a sequence holds at most 16 tokens"):
        observe(run, of_recipe(run, tmp_path))
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_bytes((recipe.parent / "model" / "config.json").read_bytes())
        broken = msgspec.structs.replace(run, model=config.Model(path=str(tmp_path / "empty")))
        observe(broken, of_recipe(broken, tmp_path))
