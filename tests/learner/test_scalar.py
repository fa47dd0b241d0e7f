"""Critics and reward models: packed they say what the padded classifier of transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import VOCABULARY, message, ragged_rollouts, tiny_run
from transformers import (
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.learner.batch import flatten, pack
from async_rl.learner.packing import Packed, Sequences, pack_sequences
from async_rl.learner.scalar import PackedScalar
from async_rl.models.loading import build_model

TINY = tiny_run().model
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip


def ragged(seed: int, prompt: int = 3) -> tuple[Sequences, list[torch.Tensor]]:
    """Two families of equal prompts, and one sequence that is nothing but its prompt; no padding token in them."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(3, VOCABULARY, prompt).astype("<i4") for _ in range(2)]
    rows = [
        np.concatenate([heads[i % 2], rng.integers(3, VOCABULARY, length)]) for i, length in enumerate((4, 1, 6, 0, 4))
    ]
    tokens_A, length_S = np.concatenate(rows).astype("<i4"), np.array([len(row) for row in rows])
    sequences = Sequences.ending(tokens_A, length_S, np.full(len(rows), prompt))
    return sequences, [torch.from_numpy(row.astype(np.int64)) for row in rows]


def packed(sequences: Sequences, *, shared: bool) -> Packed:
    family_s = np.array([1, 2, 1, 2, 1]) if shared else np.zeros(5, np.int64)
    return pack_sequences(sequences, np.arange(5), family_s)


def placed(values_K: torch.Tensor, pack: Packed) -> torch.Tensor:
    return torch.zeros(5).index_put((torch.from_numpy(pack.place_K),), values_K)


@pytest.mark.parametrize("shared", [True, False])
def test_scores_are_read_at_the_last_token(shared: bool) -> None:
    scalar = PackedScalar.load(TINY, seed=3)
    sequences, rows = ragged(1)
    pack = packed(sequences, shared=shared)
    assert pack.tokens.input_1T.numel() == sum(len(row) for row in rows) - (3 * 3 if shared else 0)
    alone = torch.stack([scalar(packed_alone(row)).squeeze() for row in rows])
    torch.testing.assert_close(placed(scalar(pack.tokens), pack), alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 1e-3


def packed_alone(row: torch.Tensor):
    one = Sequences.ending(row.numpy().astype("<i4"), np.array([len(row)]), np.array([len(row)]))
    return pack_sequences(one, np.array([0]), np.array([0])).tokens


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_model(TINY, seed=1),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, pad_token_id=0)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True, pad_token_id=0)),
    ],
)
def test_transformers_loads_it_with_equal_outputs(build: Any, tmp_path: Path) -> None:
    scalar = PackedScalar.of(build(), seed=3)
    scalar.bias = 0.25
    scalar.save(tmp_path)
    sequences, rows = ragged(2)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert theirs.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).logits.squeeze(1)
    pack = packed(sequences, shared=True)
    torch.testing.assert_close(placed(scalar(pack.tokens), pack), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(placed(scalar.score(pack.tokens), pack), expected - 0.25, atol=1e-5, rtol=1e-5)
    again = PackedScalar.load(Model(path=str(tmp_path)), seed=99)
    assert again.bias == 0.25
    for name, parameter in scalar.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_critic_reads_before_every_trained_token() -> None:
    """The same positions whose hidden states predict the tokens: V of the state in which each was sampled."""
    scalar, step = PackedScalar.load(TINY, seed=3), flatten(message(ragged_rollouts(seed=5)))
    pack_all = pack(step, range(step.num_rollouts))
    values_K = scalar(pack_all.tokens)
    assert len(values_K) == step.trainable_tokens
    rollout_N = [pack(step, [i], share_prompts=False) for i in range(step.num_rollouts)]
    separate = torch.cat([scalar(one.tokens) for one in rollout_N])
    torch.testing.assert_close(values_K.sort().values, separate.sort().values, atol=1e-5, rtol=1e-5)


def test_heads() -> None:
    drawn = PackedScalar.load(TINY, seed=3).model.score.weight
    assert torch.equal(drawn, PackedScalar.load(TINY, seed=3).model.score.weight)
    wide = Model(tiny=TINY.tiny.__class__(characters="01", hidden_size=4096, layers=1))
    assert PackedScalar.load(wide, seed=1).model.score.weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    zero = PackedScalar.load(TINY, seed=3, head="zero")
    assert not zero(packed(ragged(1)[0], shared=True).tokens).any()


def test_what_is_no_scalar_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward_model\.path = .*nowhere': there is no such directory"):
        PackedScalar.load(Model(path=str(tmp_path / "nowhere")), seed=1, field="reward_model.path")
    config = build_model(TINY, seed=1).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"critic\.path = .*: its weights cannot be loaded"):
        PackedScalar.load(Model(path=str(tmp_path)), seed=1, field="critic.path")
