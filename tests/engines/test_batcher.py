"""The embedded engine's core against transformers, without threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    STEPS,
    VOCABULARY,
    assert_covers,
    configs,
    finish,
    finish_in_pieces,
    generate,
    generate_over_swap,
    make_batcher,
    make_model,
    prompts,
    recompute,
    request,
    run,
    swap,
)
from transformers import AutoConfig, LlamaConfig

from async_rl.engines.batcher import Batcher
from async_rl.errors import UserError
from async_rl.wire.messages import VersionSpan

Model = Any


@pytest.fixture(params=["eager", "static"], autouse=True)
def _steps(request: pytest.FixtureRequest) -> Iterator[None]:
    token = STEPS.set(request.param)
    yield
    STEPS.reset(token)


@pytest.fixture(scope="module")
def llama() -> Model:
    return make_model(configs()["llama"])


@pytest.mark.parametrize("name", list(configs()))
def test_greedy_equals_generate(name: str) -> None:
    model = make_model(configs()[name])
    requests = [
        request(i, prompt, 5 + 11 * (i % 4), temperature=0.0) for i, prompt in enumerate(prompts(9, longest=70))
    ]
    chunks = run(make_batcher(model, prefill_tokens=64), requests)  # more requests than slots and than the budget
    for one in requests:
        chunk = chunks[one.id]
        assert chunk.tokens.tolist() == generate(model, one.prompt, one.max_new_tokens)
        assert chunk.finish_reason == "length"
        assert_covers(chunk)


@pytest.mark.parametrize("name", list(configs()))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_recompute(name: str, temperature: float) -> None:
    model = make_model(configs()[name])
    requests = [request(i, prompt, 30, temperature=temperature) for i, prompt in enumerate(prompts(6))]
    chunks = run(make_batcher(model), requests)
    for one in requests:
        chunk = chunks[one.id]
        expected = recompute(model, one.prompt, chunk.tokens.tolist(), temperature)
        assert np.abs(chunk.logprobs - expected.numpy()).max() < 2e-5
        assert chunk.tokens.dtype == np.int32 and chunk.logprobs.dtype == np.float32


def test_bfloat16_is_near_float32(llama: Model) -> None:
    requests = [request(i, prompt, 20) for i, prompt in enumerate(prompts(4))]
    chunks = run(make_batcher(llama, dtype=torch.bfloat16), requests)
    for one in requests:
        chunk = chunks[one.id]
        expected = recompute(llama, one.prompt, chunk.tokens.tolist())
        assert np.abs(chunk.logprobs - expected.numpy()).mean() < 0.1


def test_a_tokens_uniform_decides_whatever_is_in_the_batch(llama: Model) -> None:
    requests = [request(i, prompt, 20) for i, prompt in enumerate(prompts(6))]
    together = run(make_batcher(llama, slots=6), requests)
    few_slots = run(make_batcher(llama, slots=2), requests[::-1])
    for one in requests:
        alone = run(make_batcher(llama), [one])[one.id]
        assert alone.tokens.tolist() == together[one.id].tokens.tolist() == few_slots[one.id].tokens.tolist()
        tail = request(one.id, (*one.prompt, *alone.tokens[:8].tolist()), 12, position=8)
        assert run(make_batcher(llama), [tail])[one.id].tokens.tolist() == alone.tokens[8:].tolist()


def test_the_same_batches_repeat_bit_for_bit(llama: Model) -> None:
    requests = [request(i, prompt, 8 + i % 7) for i, prompt in enumerate(prompts(12))]
    first, second = (run(make_batcher(llama), requests) for _ in range(2))
    for one in requests:
        assert (first[one.id].tokens == second[one.id].tokens).all()
        assert (first[one.id].logprobs == second[one.id].logprobs).all()


def test_stop_tokens_end_and_stay(llama: Model) -> None:
    free = run(make_batcher(llama), [request(0, (1, 2, 3), 40)])[0].tokens.tolist()
    stop = free[10]
    cut = free.index(stop) + 1
    unseen = [token for token in range(VOCABULARY) if token not in free][:2]
    requests = [request(0, (1, 2, 3), 40, stop=frozenset({stop, *unseen})), request(1, (4,), 40)]
    chunks = run(make_batcher(llama), requests)
    assert chunks[0].tokens.tolist() == free[:cut]
    assert chunks[0].finish_reason == "eos"
    assert (len(chunks[1].tokens), chunks[1].finish_reason) == (40, "length")
    first = run(make_batcher(llama), [request(0, (1, 2, 3), 40, stop=frozenset({free[0]}))])[0]
    assert (first.tokens.tolist(), first.finish_reason) == ([free[0]], "eos")


def test_greedy_and_temperatures_in_one_batch(llama: Model) -> None:
    requests = [request(i, (5, 6, 7), 15, temperature=t) for i, t in enumerate((0.0, 1.0, 0.5, 2.0))]
    together = run(make_batcher(llama), requests)
    for one in requests:
        alone = run(make_batcher(llama), [one])[one.id]
        assert alone.tokens.tolist() == together[one.id].tokens.tolist()
        expected = recompute(llama, one.prompt, alone.tokens.tolist(), one.temperature or 1.0)
        assert np.abs(together[one.id].logprobs - expected.numpy()).max() < 2e-5


# --- shared prefill -------------------------------------------------------------------------------------------


class CountingBatcher:
    """How many prompt tokens were really computed."""

    def __init__(self, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        prefill = batcher._prefill

        def counted(live: Any, prompts: Any, slots: Any) -> torch.Tensor:
            self.tokens += sum(len(prompt) for prompt in prompts)
            return prefill(live, prompts, slots)

        monkeypatch.setattr(batcher, "_prefill", counted)


@pytest.mark.parametrize("slots", [2, 3, 8, 32])
def test_a_group_is_prefilled_once(llama: Model, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = prompts(3, seed=5)
    requests = [request(8 * g + i, prompt, 4 + 3 * i) for g, prompt in enumerate(groups) for i in range(8)]
    alone = {one.id: run(make_batcher(llama, slots=1), [one])[one.id] for one in requests}
    batcher = make_batcher(llama, slots=slots)
    counting = CountingBatcher(batcher, monkeypatch)
    chunks = run(batcher, requests)
    assert counting.tokens == sum(len(prompt) for prompt in groups)
    for one in requests:
        assert chunks[one.id].tokens.tolist() == alone[one.id].tokens.tolist()
        assert np.abs(chunks[one.id].logprobs - alone[one.id].logprobs).max() < 2e-5


def test_a_swap_voids_a_computed_prompt(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = make_model(llama.config, seed=9)
    batcher = make_batcher(llama, slots=2)
    counting = CountingBatcher(batcher, monkeypatch)
    prompt = (1, 2, 3, 4, 5)
    requests = [request(i, prompt, 6, temperature=0.0) for i in range(4)]
    batcher.submit(requests)
    batcher.step()
    swap(batcher, newer, 1)
    chunks = finish(batcher)
    assert counting.tokens == 2 * len(prompt)
    for late in requests[2:]:
        assert chunks[late.id].tokens.tolist() == generate(newer, prompt, 6)
        assert chunks[late.id].spans == [VersionSpan(0, 6, 1, 1)]


# --- swaps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_swap_changes_exactly_the_tokens_after_it(name: str) -> None:
    before, after = make_model(configs()[name], seed=1), make_model(configs()[name], seed=2)
    requests = [request(i, prompt, 16, temperature=0.0) for i, prompt in enumerate(prompts(4, seed=3))]
    unswapped = run(make_batcher(before), requests)
    batcher = make_batcher(before, version=7)
    batcher.submit(requests)
    for _ in range(5):  # the first step samples two tokens: after the prompt, and one decode step
        assert batcher.step() == []
    swap(batcher, after, 8)
    chunks = finish(batcher)
    for one in requests:
        tokens = chunks[one.id].tokens.tolist()
        assert chunks[one.id].spans == [VersionSpan(0, 6, 7, 7), VersionSpan(6, 16, 8, 7)]
        assert tokens[:6] == unswapped[one.id].tokens.tolist()[:6]
        assert (chunks[one.id].logprobs[:6] == unswapped[one.id].logprobs[:6]).all()
        assert tokens == generate_over_swap(before, after, one.prompt, 16, swap_at=6)
        assert tokens != unswapped[one.id].tokens.tolist()


def test_two_swaps_and_a_late_request(llama: Model) -> None:
    batcher = make_batcher(llama, slots=2, version=3)
    batcher.submit([request(0, (1, 2), 9), request(1, (3,), 4), request(2, (4,), 3)])
    batcher.step()
    swap(batcher, llama, 4)
    batcher.step()
    swap(batcher, llama, 5)
    swap(batcher, llama, 6)
    chunks = finish(batcher)
    assert chunks[0].spans == [VersionSpan(0, 2, 3, 3), VersionSpan(2, 3, 4, 3), VersionSpan(3, 9, 6, 3)]
    assert chunks[1].spans == [VersionSpan(0, 2, 3, 3), VersionSpan(2, 3, 4, 3), VersionSpan(3, 4, 6, 3)]
    assert chunks[2].spans == [VersionSpan(0, 3, 6, 6)]


@pytest.mark.parametrize("name", list(configs()))
@pytest.mark.parametrize("prefill_tokens", [16, None])
def test_off_the_device_and_back_under_other_weights(name: str, prefill_tokens: int | None) -> None:
    """What is sampled afterwards is what the new weights say of the whole sequence, as the learner recomputes it."""
    before, after = make_model(configs()[name]), make_model(configs()[name], seed=5)
    batcher = make_batcher(before, slots=6, prefill_tokens=prefill_tokens)
    requests = [request(i, prompt, 6 + 9 * (i % 3)) for i, prompt in enumerate(prompts(9))]
    batcher.submit(requests)
    chunks = {chunk.request_id: chunk for _ in range(8) for chunk in batcher.step()}
    batcher.release()
    assert not batcher.has_work
    swap(batcher, after, 1)
    chunks |= finish(batcher)
    in_flight = 0
    for one in requests:
        chunk = chunks[one.id]
        assert_covers(chunk)
        assert len(chunk.tokens) == one.max_new_tokens
        tokens = chunk.tokens.tolist()
        expected = {0: recompute(before, one.prompt, tokens).numpy(), 1: recompute(after, one.prompt, tokens).numpy()}
        in_flight += len(chunk.spans) == 2
        for span in chunk.spans:
            assert span.kv_version == span.version
            where = slice(span.start, span.end)
            assert np.abs(chunk.logprobs[where] - expected[span.version][where]).max() < 2e-5
    assert in_flight > 2


def test_leaving_the_device_changes_no_token(llama: Model) -> None:
    requests = [request(i, prompt, 20 + i) for i, prompt in enumerate(prompts(4))]
    stayed = run(make_batcher(llama), requests)
    batcher = make_batcher(llama)
    batcher.submit(requests)
    for _ in range(5):
        batcher.step()
        batcher.release()
        swap(batcher, llama, 0)
    left = finish(batcher)
    for one in requests:
        assert left[one.id].tokens.tolist() == stayed[one.id].tokens.tolist()
        assert np.abs(left[one.id].logprobs - stayed[one.id].logprobs).max() < 2e-5


def test_a_request_that_is_cancelled_off_the_device_returns_what_it_had(llama: Model) -> None:
    requests = [request(i, prompt, 20) for i, prompt in enumerate(prompts(3))]
    whole = run(make_batcher(llama), requests)
    batcher = make_batcher(llama)
    batcher.submit(requests)
    for _ in range(4):
        batcher.step()
    batcher.release()
    (cancelled,) = batcher.cancel([1])
    assert cancelled.finish_reason == "aborted" and cancelled.tokens.tolist() == whole[1].tokens.tolist()[:5]
    swap(batcher, llama, 1)
    left = finish(batcher)
    assert left.keys() == {0, 2} and all(len(chunk.tokens) == 20 for chunk in left.values())


def test_prepared_weights_share_no_memory(llama: Model) -> None:
    tensors = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    batcher = make_batcher(llama)
    batcher.swap(batcher.weights, batcher.prepare(tensors))  # type: ignore[arg-type]
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    one = request(0, (1, 2, 3), 10, temperature=0.0)
    assert run(batcher, [one])[0].tokens.tolist() == generate(llama, one.prompt, 10)


def test_weights_of_another_model_are_refused(llama: Model) -> None:
    batcher = make_batcher(llama)
    tensors = dict(llama.named_parameters())
    missing = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down" not in name}
    with pytest.raises(ValueError, match=r"the weights lack model\.layers\.1\.mlp\.down_proj\.weight"):
        batcher.prepare(missing)
    with pytest.raises(ValueError, match=r"q_proj\.weight has 3 rows, the config says 48"):
        batcher.prepare({**tensors, "model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 48)})


# --- cancel, segments, growth ---------------------------------------------------------------------------------


def test_cancel_returns_what_was_sampled(llama: Model) -> None:
    requests = [request(i, (1, 2, 3 + i), 20) for i in range(4)]
    whole = run(make_batcher(llama), requests)
    batcher = make_batcher(llama, slots=2)
    batcher.submit(requests)
    for _ in range(3):
        batcher.step()
    chunks = {chunk.request_id: chunk for chunk in batcher.cancel([0, 3, 99, 0])}
    assert chunks.keys() == {0, 3}
    assert chunks[0].tokens.tolist() == whole[0].tokens.tolist()[:4]
    assert [len(chunks[3].tokens), chunks[3].spans] == [0, []]
    assert {chunk.finish_reason for chunk in chunks.values()} == {"aborted"}
    assert_covers(chunks[0])
    rest = finish(batcher)
    assert rest.keys() == {1, 2}
    assert all(rest[i].tokens.tolist() == whole[i].tokens.tolist() for i in rest)
    assert batcher.cancel([1]) == []


def test_segments_join_to_the_whole(llama: Model) -> None:
    options: dict[str, Any] = {"stop": frozenset({7}), "segment_tokens": 5}
    requests = [request(i, prompt, 17, **options) for i, prompt in enumerate(prompts(6))]
    whole = run(make_batcher(llama), [request(one.id, one.prompt, 17, stop=one.stop) for one in requests])
    batcher = make_batcher(llama)
    batcher.submit(requests)
    pieces = finish_in_pieces(batcher)
    for one in requests:
        *unfinished, last = pieces[one.id]
        assert all(len(chunk.tokens) == 5 and chunk.finish_reason is None for chunk in unfinished)
        assert last.finish_reason == whole[one.id].finish_reason
        assert [t for chunk in pieces[one.id] for t in chunk.tokens.tolist()] == whole[one.id].tokens.tolist()
        assert np.concatenate([chunk.logprobs for chunk in pieces[one.id]]) == pytest.approx(whole[one.id].logprobs)


def test_the_cache_grows_with_sequences_in_flight(llama: Model) -> None:
    requests = [request(0, (1, 2), 150, temperature=0.0), request(1, tuple(range(50)) * 2, 60, temperature=0.0)]
    chunks = run(make_batcher(llama, slots=2), requests)
    for one in requests:
        assert chunks[one.id].tokens.tolist() == generate(llama, one.prompt, one.max_new_tokens)
    full = request(0, tuple(range(50)), 150)  # 200 in all: the last position of a slot
    assert len(run(make_batcher(llama, slots=2), [full])[0].tokens) == 150


def test_many_requests_come_and_go(llama: Model) -> None:
    """Slots are refilled and gaps closed in every way; each request must not notice."""
    free = [request(i, prompt, 1 + i % 13) for i, prompt in enumerate(prompts(40, seed=8, longest=12))]
    batcher = make_batcher(llama, slots=5)
    chunks: dict[int, Any] = {}
    for first in range(0, 40, 4):
        batcher.submit(free[first : first + 4])
        for _ in range(3):
            chunks |= {chunk.request_id: chunk for chunk in batcher.step()}
        if first % 8 == 0:
            chunks |= {chunk.request_id: chunk for chunk in batcher.cancel([first])}
    chunks |= finish(batcher)
    assert len(chunks) == 40
    for one in free:
        alone = run(make_batcher(llama), [one])[one.id].tokens.tolist()
        assert chunks[one.id].tokens.tolist() == alone[: len(chunks[one.id].tokens)]
        assert chunks[one.id].finish_reason == "aborted" or len(chunks[one.id].tokens) == one.max_new_tokens


# --- what is refused ------------------------------------------------------------------------------------------


def test_an_id_is_alive_once(llama: Model) -> None:
    batcher = make_batcher(llama)
    batcher.submit([request(0, (1,))])
    for _ in range(2):  # waiting, then in a slot
        with pytest.raises(ValueError, match="request 0 is alive already"):
            batcher.submit([request(0, (2,))])
        batcher.step()


def test_max_length_is_at_most_the_models(llama: Model) -> None:
    assert make_batcher(llama, max_length=0).max_length == 256
    assert make_batcher(llama, max_length=1000).max_length == 256
    batcher = make_batcher(llama, max_length=20)
    with pytest.raises(ValueError, match="max_new_tokens = 18 after a prompt of 3: a sequence holds at most 20 tokens"):
        batcher.check(request(0, (1, 2, 3), 18))
    with pytest.raises(ValueError, match=rf"prompt\[1\] = {VOCABULARY}: the vocabulary is 0 to {VOCABULARY - 1}"):
        batcher.check(request(0, (1, VOCABULARY), 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: AutoConfig.for_model("gpt2"), "gpt2 is not supported"),
        (lambda: LlamaConfig(hidden_act="gelu"), "hidden_act is 'gelu': the embedded engine runs silu"),
        (
            lambda: LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope_type is 'dynamic': the embedded engine runs default",
        ),
    ],
)
def test_models_it_cannot_run(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Batcher(config(), slots=1, max_length=8, dtype=torch.float32, device=torch.device("cpu"))
