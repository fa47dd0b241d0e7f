"""Log-probs, entropy, loss and gradients of a packed step equal those of the padded model, to 1e-5 in fp32."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Rollout, Run
from async_rl.learner import logprobs, packed_attention
from async_rl.learner.batch import StepBatch, flatten, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.logprobs import token_logprobs
from async_rl.learner.packed_attention import run_packed, use_packed_attention
from async_rl.learner.packing import Block, Family
from async_rl.learner.trainer import Learner, build_objective
from async_rl.models.loading import build_model
from async_rl.wire.messages import TrainRollout


def padded_logits(model: PreTrainedModel, step: StepBatch, rollouts: list[TrainRollout]) -> Tensor:
    """[S, L, V] of a right-padded batch."""
    sequences = [np.frombuffer(s.tokens, "<i4").astype(np.int64) for rollout in rollouts for s in rollout.sequences]
    ids = torch.zeros(len(sequences), int(step.sequences.length_S.max()), dtype=torch.long)
    attended = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)], attended[row, : len(tokens)] = torch.from_numpy(tokens), 1
    return model(ids, attention_mask=attended, use_cache=False).logits


def reference(run: Run, model: PreTrainedModel, rollouts: list[TrainRollout]) -> Tensor:
    """The loss, with a graph; token by token from padded logits."""
    step = flatten(message(rollouts))
    log_p_SLV = (padded_logits(model, step, rollouts).float() / run.rollout.temperature).log_softmax(-1)
    logp: list[Tensor] = []
    behaviour: list[float] = []
    rollout_T: list[int] = []
    row = 0
    for index, rollout in enumerate(rollouts):
        for sequence in rollout.sequences:
            tokens, recorded = np.frombuffer(sequence.tokens, "<i4"), np.frombuffer(sequence.logprobs, "<f4")
            for span in sequence.spans:
                for t in range(span.start, span.end):
                    logp.append(log_p_SLV[row, t - 1, int(tokens[t])])
                    behaviour.append(float(recorded[t]))
                    rollout_T.append(index)
            row += 1
    objective = build_objective(run)
    rewards_N, group_N = torch.from_numpy(step.rewards_N), torch.from_numpy(step.group_N)
    mask_T, sequence_T = torch.ones(len(logp), dtype=torch.bool), torch.tensor(rollout_T)
    tokens = TokenBatch(
        logp_T=torch.stack(logp),
        behaviour_T=torch.tensor(behaviour),
        mask_T=mask_T,
        sequence_T=sequence_T,
        advantages_N=objective.advantages(rewards_N, group_N),
    )
    return objective.loss(tokens, Normaliser.of(mask_T, sequence_T, len(rollouts), run.rollout.max_new_tokens)).loss


@pytest.fixture(params=["dense", "flash"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families with a common prompt: as one masked matrix, or by merged flash attention."""
    monkeypatch.setattr(packed_attention, "DENSE_TOKENS", 0 if request.param == "flash" else 1024)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_loss_and_gradient_of_a_step(ranks: Ranks, tmp_path: Path, temperature: float, aggregation: str) -> None:
    run = tiny_run(rollout=Rollout(groups_per_step=4, group_size=4, max_new_tokens=8, temperature=temperature))
    options = {**run.algorithm.options, "aggregation": aggregation}
    run = msgspec.structs.replace(run, algorithm=msgspec.structs.replace(run.algorithm, options=options))
    rollouts = ragged_rollouts(seed=1)
    model = build_model(run.model, seed=run.seed)
    loss = reference(run, model, rollouts)
    loss.backward()

    learner = Learner(run, tmp_path, ranks)
    metrics = learner.train(message(rollouts))

    assert metrics["skipped"] == 0
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert metrics["guarded_fraction"] > 0, "the case should exercise the guard"
    expected = dict(model.named_parameters())
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def tiny_qwen(kind: str) -> PreTrainedModel:
    shape = {
        "vocab_size": 14,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_log_probs_and_entropy(kind: str) -> None:
    model = build_model(tiny_run().model, seed=1) if kind == "llama" else tiny_qwen(kind)
    model.eval()
    rollouts = ragged_rollouts(seed=2)
    step = flatten(message(rollouts))
    microbatch = pack(step, range(len(rollouts)))
    with torch.no_grad():
        log_p_SLV = padded_logits(model, step, rollouts).log_softmax(-1)
        use_packed_attention(model)
        hidden_TH = run_packed(
            model, microbatch.tokens.input_1T, microbatch.tokens.position_1T, microbatch.tokens.families
        )
        weight_VH = model.get_output_embeddings().weight
        found = token_logprobs(hidden_TH[microbatch.tokens.predictor_K], weight_VH, microbatch.tokens.target_K)
    expected: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    row = 0
    for index, rollout in enumerate(rollouts):
        for sequence in rollout.sequences:
            for span in sequence.spans:
                for t in range(span.start, span.end):
                    token = int(np.frombuffer(sequence.tokens, "<i4")[t])
                    log_p_V, behaviour = log_p_SLV[row, t - 1], float(np.frombuffer(sequence.logprobs, "<f4")[t])
                    entropy = float(-(log_p_V.exp() * log_p_V).sum())
                    expected.setdefault((index, token), []).append((behaviour, float(log_p_V[token]), entropy))
            row += 1
    got: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for k in range(len(microbatch.tokens.target_K)):
        key = int(microbatch.sample_K[k]), int(microbatch.tokens.target_K[k])
        got.setdefault(key, []).append(
            (float(microbatch.behaviour_K[k]), float(found.logp_K[k]), float(found.entropy_K[k]))
        )
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(sorted(got[key]), sorted(values), atol=1e-5)


@pytest.mark.parametrize("chunk_elements", [1, 50, 1 << 20])
@pytest.mark.parametrize(("fused", "room"), [(False, False), (True, False), (True, True)])
def test_head_in_chunks_equals_autograd(
    chunk_elements: int, fused: bool, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_compiled", lambda function: function)
    monkeypatch.setattr(logprobs, "_has_room", lambda nbytes, device: room)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 11, (23,), generator=generator)
    pull = torch.randn(2, 23, generator=generator, dtype=torch.float64)

    def gradients(chunked: bool) -> tuple[Tensor, ...]:
        h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
        if chunked:
            options = {"chunk_elements": chunk_elements, "fused": fused}
            logp, entropy = token_logprobs(h, w, target, temperature=0.7, **options)
        else:
            log_p = (h @ w.t() / 0.7).log_softmax(-1)
            logp, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        (logp @ pull[0].float() + entropy @ pull[1].float()).backward()
        assert h.grad is not None and w.grad is not None
        return logp.detach(), entropy.detach(), h.grad, w.grad

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("length", [2, 7, 192, 193])
def test_short_and_long_sequences_in_bfloat16_attend_alike(length: int) -> None:
    """Either side of DENSE_LENGTH, two sequences of 6 heads over 2, against fp32: output and gradients."""
    generator = torch.Generator().manual_seed(length)
    family = Family(0, (Block(2, length),))
    inputs = [torch.randn(1, heads, 2 * length, 16, generator=generator) for heads in (6, 2, 2)]
    seed = torch.randn(1, 2 * length, 6, 16, generator=generator)
    found: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.bfloat16().to(dtype).requires_grad_() for x in inputs)
        output = packed_attention.attend(q, k, v, (family,), None)
        found.append([output, *torch.autograd.grad((output.float() * seed).sum(), (q, k, v))])
    for exact, low in zip(*found, strict=True):
        assert (low.float() - exact).norm() < 1e-2 * exact.norm() + 1e-6


def test_bfloat16_autocast_trains_on_common_prompts(ranks: Ranks, tmp_path: Path) -> None:
    losses: list[float] = []
    for dtype in ("float32", "bfloat16"):
        learner = Learner(tiny_run(learner=LearnerConfig(dtype=dtype)), tmp_path / dtype, ranks)
        losses.append(learner.train(message(ragged_rollouts(seed=3)))["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_layers_computed_again_give_the_same_gradient(ranks: Ranks, tmp_path: Path) -> None:
    found: list[list[Tensor]] = []
    for recompute in (False, True):
        run = tiny_run(learner=LearnerConfig(activation_checkpointing=recompute, dtype="bfloat16"))
        learner = Learner(run, tmp_path / str(recompute), ranks)
        learner.train(message(ragged_rollouts(seed=3)))
        found.append([p.grad for p in learner.model.parameters() if p.grad is not None])
    assert len(found[0]) == 21 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sequences_longer_than_a_sliding_window_are_refused() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    use_packed_attention(model)
    microbatch = pack(flatten(message(ragged_rollouts(seed=1))), [0, 1, 2])
    with pytest.raises(ValueError, match="sliding window of 4"):
        run_packed(model, microbatch.tokens.input_1T, microbatch.tokens.position_1T, microbatch.tokens.families)
